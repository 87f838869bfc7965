"""Draws many samples at once with the `tinker` SDK; prints how many came, and what failed, as JSON."""

from __future__ import annotations

import json
import os
import time
import warnings

import tinker
from tinker import types

warnings.simplefilter("ignore")

MANY = 512


def main() -> None:
    service = tinker.ServiceClient()
    sampling = service.create_sampling_client(base_model=os.environ["BASE_MODEL"]).result()
    params = types.SamplingParams(max_tokens=4)
    prompts = [types.ModelInput.from_ints([1 + index % 500, 7, 9]) for index in range(MANY)]
    began_at = time.time()
    futures = [sampling.sample(prompt, 1, params) for prompt in prompts]
    drawn, failed = 0, list[str]()
    for future in futures:
        try:
            drawn += len(future.result().sequences)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is printed
            failed.append(repr(error))
    times = [began_at, time.time()]
    print(json.dumps({"drawn": drawn, "failed": failed, "times": times}))


if __name__ == "__main__":
    main()
