"""A training run of a detector that takes about a second."""

import json

SHORT = (
    *("data.num_train=6", "size=64", "views=2", "batch_size=4", "duration={steps: 4}", "expect=[]", "log_every=1"),
    *("evaluate_test=false", "threads=1"),
)


def train(cvlab, *args, name="yolo_scenes"):
    code, out, err = cvlab("train", name, *SHORT, *args, "--json")
    assert code == 0, err
    return json.loads(out)
