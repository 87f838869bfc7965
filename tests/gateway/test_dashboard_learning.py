"""Runs that learn, on the dashboard: what each waits for, stopped, started again, and nobody else's to see."""

from __future__ import annotations

from support.dashboard import Window, signed_in
from support.gateway import Rig
from support.learning import ALIAS, judged, point_alias, reached, started, state_of


def settings(run_id: str, **changes: str) -> dict[str, str]:
    """The form's fields."""
    plain = {"run_id": run_id, "alias": ALIAS, "lr": "0.01", "min_batch": "2", "max_batch": "4"}
    return plain | {"publish": "live"} | changes


async def shows(window: Window, *texts: str) -> None:
    page = await window.page("/learning")
    for text in texts:
        assert text in page, text


async def test_a_run_is_started_stopped_and_started_again(rig: Rig) -> None:
    """By forms, with what it learns and what it waits for on the page."""
    await point_alias(rig)
    run_id = (await rig.tenant.new_run()).run_id
    async with signed_in(rig, rig.tenant) as window:
        await shows(window, "No run learns from feedback yet", f'<option value="{run_id}"')
        assert (await window.send("/learning/start", **settings(run_id))).status_code == 303
        await shows(window, ">learning<", "0 of 2 judged completions", "alias follows")
        await judged(rig, 1.0)
        await shows(window, "1 of 2 judged completions")
        await judged(rig, 0.0)
        await reached(rig, run_id, lambda state: state.steps == 1)
        await shows(window, "0 of 2 judged completions", "0.01, 2 to 4 a step")
        assert (await window.send("/learning/stop", run_id=run_id)).status_code == 303
        await shows(window, ">stopped<", "Start again")
        assert (await window.send("/learning/again", run_id=run_id)).status_code == 303
        begun = await state_of(rig, run_id)
        assert (begun.status, begun.steps, begun.settings.max_batch) == ("learning", 0, 4)
        assert begun.settings.publish == "live"


async def test_wrong_settings_are_refused_in_words(rig: Rig) -> None:
    """What the API refuses, the form does; a run that fails says why."""
    await point_alias(rig)
    run_id = (await rig.tenant.new_run()).run_id
    async with signed_in(rig, rig.tenant) as window:
        for changes in (
            {"lr": "x"},
            {"lr": "-1"},
            {"lr": "nan"},
            {"min_batch": "0"},
            {"min_batch": "9"},
            {"max_batch": "1.5"},
            {"alias": ""},
        ):
            refused = await window.send("/learning/start", **settings(run_id, **changes))
            assert refused.status_code == 422, changes
            assert 'role="alert"' in refused.text
        missing = await window.send("/learning/start", **settings(run_id, alias="no", publish=""))
        assert missing.status_code == 404
        for route in ("start", "again", "stop"):
            answer = await window.send(f"/learning/{route}", **settings("run_0"))
            assert answer.status_code == 404, route
        await started(rig, run_id)
        query = "update learning set status = 'failed', reason = '<b>gone' where run_id = $1"
        await rig.services.pool.execute(query, run_id)
        await shows(window, "&lt;b&gt;gone", ">failed<")


async def test_a_stranger_neither_sees_nor_stops_it(rig: Rig) -> None:
    """Another's learning is one that nobody has; an admin sees and stops it, and it goes on in its tenant's name."""
    await point_alias(rig)
    run_id = (await rig.tenant.new_run()).run_id
    await started(rig, run_id)
    async with signed_in(rig, rig.stranger) as window:
        assert run_id not in await window.page("/learning")
        for route in ("start", "again", "stop"):
            answer = await window.send(f"/learning/{route}", **settings(run_id))
            assert answer.status_code == 404, route
    assert (await state_of(rig, run_id)).status == "learning"
    async with signed_in(rig, rig.admin) as window:
        await shows(window, run_id, "<td>tenant</td>")
        assert (await window.send("/learning/stop", run_id=run_id)).status_code == 303
        assert (await state_of(rig, run_id)).status == "stopped"
        assert (await window.send("/learning/again", run_id=run_id)).status_code == 303
    key_id = await rig.services.pool.fetchval(
        "select key_id from learning where run_id = $1", run_id
    )
    assert key_id == rig.tenant.key_id


async def test_forms_need_their_token(rig: Rig) -> None:
    """Each form is refused without it."""
    run_id = (await rig.tenant.new_run()).run_id
    async with signed_in(rig, rig.tenant) as window:
        for route in ("start", "again", "stop"):
            form = settings(run_id)
            answer = await window.client.post(f"/admin/learning/{route}", data=form)
            assert answer.status_code == 403
