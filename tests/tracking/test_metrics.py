import json

from dash_train.tracking.metrics import MetricsFile, read_metrics


def line(step, **values):
    return {"step": step, "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 10.0, **values}


def test_the_last_line_of_a_step_counts_and_torn_lines_do_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2, loss=2.0)) + '\n{"step": 3, "lo')
    metrics = MetricsFile(tmp_path)
    metrics.write(line(2, loss=3.0))
    metrics.write({"step": 2, "validation_loss": 4.0})
    metrics.write(line(3, grad_norm=float("inf")))
    metrics.close()
    training, validation = read_metrics(tmp_path)
    assert [(values["step"], values["loss"]) for values in training] == [(1, 1.0), (2, 3.0), (3, 1.0)]
    assert training[-1]["grad_norm"] is None
    assert validation == [{"step": 2, "validation_loss": 4.0}]
