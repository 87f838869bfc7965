"""What is generated is what its source says."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]


def test_the_modules_of_protobuf_files_are_what_making_them_anew_gives(tmp_path: Path) -> None:
    """Nobody edits generated modules, or forgets to make them after editing a `.proto`."""
    subprocess.run([REPOSITORY / "ops" / "protos", tmp_path], check=True, capture_output=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2.py*"))
    assert len(made) >= 4
    for path in made:
        kept = REPOSITORY / "gateway" / path
        assert kept.read_text() == (tmp_path / path).read_text(), f"run ops/protos: {path} is old"
