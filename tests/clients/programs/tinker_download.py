"""Downloads a training checkpoint as the cookbook does, encrypted on its way; arguments: its path, and a folder."""

import json
import sys
from pathlib import Path

from tinker_cookbook import weights
from tinker_cookbook.exceptions import WeightsDownloadError

path, folder = sys.argv[1:]
made = Path(weights.download(tinker_path=path, output_dir=folder))
try:
    weights.download(tinker_path=f"{path}-nothing", output_dir=folder)
except WeightsDownloadError as error:
    refused = str(error)
else:
    refused = "nothing"
files = {file.name: file.read_bytes().hex() for file in made.iterdir()}
print(json.dumps({"files": files, "refused": refused}))
