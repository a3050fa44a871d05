from pathlib import Path

from dash_train.distributed import agreement


def test_ranks_compare_the_whole_source(monkeypatch):
    """A rank whose trainer, model, kernels or data differ would train another model."""
    read = set()
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or read_bytes(path))
    agreement._source_digest()
    endings = ("/training/trainer.py", "/data/loader.py", "/model/attention.py", "/kernels/entmax.py")
    assert all(any(str(path).endswith(ending) for path in read) for ending in endings)
