"""What a trained model is good for, by one way of decoding; one file a task.

A task is a module with `add_arguments(parser)`, `run(subject, args) -> result` (what goes into JSON), `table(result)`
(for rich) and `draw(result, figure)` (matplotlib); tasks.py lists them.
"""
