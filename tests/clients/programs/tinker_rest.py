"""Every public method of the Tinker SDK's rest and admin clients, each also with bad input; prints what came, as JSON.

Arguments: the path of another account's published checkpoint, and that of one it did not publish.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import tinker
from tinker import types

published, private = sys.argv[1:]
told: dict[str, Any] = {}
refused: dict[str, list[str]] = {}


def keep(name: str, value: Any) -> None:
    told[name] = value


def refuse(name: str, ask: Callable[[], Any]) -> None:
    """Notes how the client raises what the server refuses."""
    try:
        came = ask().result()
    except (tinker.TinkerError, ValueError, RuntimeError) as error:
        refused[name] = [type(error).__name__, str(error)]
    else:
        refused[name] = ["nothing", repr(came)]


service = tinker.ServiceClient(user_metadata={"experiment": "seven"}, project_id="lab")
rest = tinker.RestClient()
base = rest.get_server_capabilities().result().supported_models[0].model_name
training = service.create_lora_training_client(
    base, rank=4, user_metadata={"renderer_name": "plain"}
)
saved = training.save_state("state", ttl_seconds=7200, user_metadata={"step": "0"}).result().path
sampler = training.save_weights_for_sampler("sample").result().path
external = training.save_weights_external("out", ttl_seconds=7200).result().path
run_id = training.get_info().model_id
session_id = run_id.partition(":")[0]
sampling = service.create_sampling_client(model_path=sampler)

# ---- Runs and checkpoints --------------------------------------------------------------------------------------------

run = rest.get_training_run(run_id).result()
keep("run", run.model_dump(mode="json"))
keep("run_by_path", rest.get_training_run_by_tinker_path(saved).result().training_run_id == run_id)
keep("runs", rest.list_training_runs(limit=1).result().model_dump(mode="json")["cursor"])
keep("runs_of_project", len(rest.list_training_runs(project_id="lab").result().training_runs))
keep("runs_of_no_project", len(rest.list_training_runs(project_id="none").result().training_runs))
keep("weights_info", rest.get_weights_info_by_tinker_path(saved).result().model_dump(mode="json"))
keep("published_info", rest.get_weights_info_by_tinker_path(published).result().lora_rank)
found = rest.list_checkpoints(run_id).result().checkpoints
keep("checkpoints", [one.model_dump(mode="json") for one in found])
page = rest.list_user_checkpoints(limit=2, offset=1).result()
keep("page", [len(page.checkpoints), page.cursor.model_dump()])

urls = rest.get_external_weights_urls(external).result()
keep("urls", urls.urls)
keep("urls_end_in_s", (urls.expires - datetime.now(UTC)).total_seconds())

rest.publish_checkpoint_from_tinker_path(saved).result()
rest.unpublish_checkpoint_from_tinker_path(saved).result()
rest.publish_checkpoint_from_tinker_path(sampler).result()
rest.set_checkpoint_ttl_from_tinker_path(saved, None).result()
rest.set_checkpoint_ttl_from_tinker_path(sampler, 3600).result()
found = {one.tinker_path: one for one in rest.list_checkpoints(run_id).result().checkpoints}
keep("for_ever", found[saved].expires_at is None)
keep("for_an_hour", (found[sampler].expires_at - datetime.now(UTC)).total_seconds())
keep("public", [found[saved].public, found[sampler].public])

copied = rest.copy_weights(published, "archive", ttl_seconds=3600).result()
keep("copied", copied.rpartition("/")[2])
keep("copy", rest.get_weights_info_by_tinker_path(copied).result().base_model == base)
again = service.copy_weights(saved).result()
keep("copied_own", again.rpartition("/")[2])
loaded = service.create_training_client_from_state(published)
keep("loaded", loaded.get_info().model_id.startswith(session_id))

rest.delete_checkpoint(run_id, "external_weights/out").result()
rest.delete_checkpoint_from_tinker_path(copied).result()
keep("left", len(rest.list_checkpoints(run_id).result().checkpoints))

# ---- Sessions --------------------------------------------------------------------------------------------------------

session = rest.get_session(session_id).result()
keep("session_runs", run_id in session.training_run_ids)
keep("session_samplers", len(session.sampler_ids))
keep("session_metadata", session.user_metadata)
keep("sampler", rest.get_sampler(session.sampler_ids[0]).result().base_model == base)
keep("sessions", session_id in rest.list_sessions().result().sessions)
rest.assign_session_project(session_id, "moved").result()


def search(**wanted: Any) -> types.SessionSearchResponse:
    request = types.SessionSearchRequest(**wanted)
    return rest.search_sessions(request).result()


one = search(session_id=session_id).sessions[0]
keep("found", one.model_dump(mode="json"))
keep("found_by_metadata", len(search(user_metadata={"experiment": "seven"}).sessions))
keep("found_by_project", len(search(project_ids=["moved"]).sessions))
keep("found_by_other", len(search(user_metadata={"experiment": "eight"}).sessions))
first = search(limit=1)
second = search(limit=1, cursor=first.next_cursor)
keep("pages", first.sessions[0].session_id != second.sessions[0].session_id)

# ---- Account ---------------------------------------------------------------------------------------------------------

hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
begin, end = hour - timedelta(hours=2), hour + timedelta(hours=1)
admin = tinker.AdminClient()
usage = admin.get_billing_usage(begin, end).result()
keep("usage", [event.model_dump(mode="json") for event in usage.data])
keep("usage_sessions", {name: it.user_metadata for name, it in usage.sessions.items()})
keep("usage_of_rest", len(rest.get_billing_usage(begin, end).result().data))
keep("stored", admin.get_current_checkpoint_storage_usage().result().model_dump(mode="json"))
keep("stored_none", rest.get_current_checkpoint_storage_usage("none").result().data)
keep("audit", [entry.event for entry in admin.get_audit_log().result().entries])
keep("audit_none", rest.get_audit_log("teams").result().entries)
keep("telemetry", rest.get_telemetry() is None)

# ---- Bad input -------------------------------------------------------------------------------------------------------

nothing = f"tinker://{run_id}/weights/nothing"
refuse("run", lambda: rest.get_training_run("nobody"))
refuse("run_number", lambda: rest.get_training_run(f"{session_id}:train:999"))
refuse("run_by_path", lambda: rest.get_training_run_by_tinker_path("tinker://x/weights/y"))
refuse("weights_info", lambda: rest.get_weights_info_by_tinker_path(nothing))
refuse("private", lambda: rest.get_weights_info_by_tinker_path(private))
refuse("runs", lambda: rest.list_training_runs(limit=0))
refuse("checkpoints", lambda: rest.list_checkpoints("nobody"))
refuse("page", lambda: rest.list_user_checkpoints(offset=-1))
refuse("urls", lambda: rest.get_external_weights_urls(external))
refuse("delete", lambda: rest.delete_checkpoint(run_id, "sampler_weights/nothing"))
refuse("delete_foreign", lambda: rest.delete_checkpoint_from_tinker_path(published))
refuse("publish", lambda: rest.publish_checkpoint_from_tinker_path(sampler))
refuse("unpublish", lambda: rest.unpublish_checkpoint_from_tinker_path(saved))
refuse("ttl", lambda: rest.set_checkpoint_ttl_from_tinker_path(saved, 0))
refuse("copy", lambda: rest.copy_weights(private, "archive"))
refuse("copy_token", lambda: rest.copy_weights(saved, "archive", weights_access_token="t"))
refuse("copy_project", lambda: rest.copy_weights(saved, "no project/"))
refuse("session", lambda: rest.get_session("nobody"))
refuse("sampler", lambda: rest.get_sampler(f"{session_id}:sample:999"))
refuse("project", lambda: rest.assign_session_project(session_id, " "))
refuse("trace", lambda: rest.export_session_trace(session_id))
refuse("trace_of_nobody", lambda: rest.export_session_trace("nobody"))
refuse("search", lambda: rest.search_sessions(types.SessionSearchRequest(display_name="\0")))
refuse("usage", lambda: admin.get_billing_usage(end, begin))
refuse("usage_minutes", lambda: admin.get_billing_usage(begin + timedelta(minutes=1), end))
refuse("recipients", lambda: training.save_weights_external("x", age_encryption_recipients=["me"]))
refuse("whoami", rest.whoami)

service.close("interrupted").result()
keep("finished", search(session_id=session_id).sessions[0].status.model_dump(mode="json"))
print(json.dumps({"told": told, "refused": refused, "run_id": run_id, "session_id": session_id}))
