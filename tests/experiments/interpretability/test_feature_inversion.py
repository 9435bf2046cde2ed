"""Feature inversion."""

import json

from cvlab.data import photos


def test_an_image_is_saved_for_each_layer(cvlab, tmp_path):
    code, out, err = cvlab(
        "run", "feature_inversion", "layers=[blocks.0,blocks.2]", "steps=30", "expect=[psnr_db/blocks.0>=12]", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    rows = result["results"]
    assert [row["layer"] for row in rows] == ["blocks.0", "blocks.2"]
    assert (
        result["metrics"]["psnr_db_first"] == result["metrics"]["psnr_db/blocks.0"] > result["metrics"]["psnr_db_last"]
    )
    for row in rows:
        image = photos.load(tmp_path / "runs" / result["run"].split("/")[-1] / row["image"])
        assert image.size == (224, 224)


def test_duplicate_layers_are_rejected(cvlab):
    code, _, err = cvlab("run", "feature_inversion", "layers=[blocks.0,blocks.0]")
    assert code == 2
    assert "each once" in err
