"""Small data sets in COCO's layout with boxes and captions, written without the writers of cvlab."""

import dataclasses
import json
import random

from PIL import Image

CATEGORIES = {1: "person", 3: "car", 7: "traffic light"}  # the ids have gaps, like those of COCO


def coco_documents(seed, names, size=(60, 40)):
    """Return the JSON documents `instances` and `captions` of some photos."""
    rng = random.Random(seed)
    images = [
        {"id": 10 * k + seed, "file_name": name, "width": size[0], "height": size[1]} for k, name in enumerate(names)
    ]
    boxes, captions = [], []
    for image in images:
        for _ in range(rng.randint(1, 4)):
            x, y = rng.randint(0, size[0] - 20), rng.randint(0, size[1] - 20)
            box = [x + 0.5, y + 0.25, rng.randint(5, 18), rng.randint(5, 18)]
            category = rng.choice(list(CATEGORIES))
            boxes.append(
                {"id": len(boxes), "image_id": image["id"], "category_id": category, "bbox": box, "iscrowd": 0}
            )
        for k in range(5):
            text = f"Caption {k} of a photo, {rng.choice(['red', 'blue'])}."
            captions.append({"id": len(captions), "image_id": image["id"], "caption": text})
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    return {
        "instances": {"images": images, "annotations": boxes, "categories": categories},
        "captions": {"images": images, "annotations": captions},
    }


def write_coco_set(root, coco_set, counts, suffix=".jpg"):
    """Write a data set with `counts` photos in its splits below `root`; return the documents by content and split."""
    folder = root / coco_set.name
    (folder / "annotations").mkdir(parents=True)
    written = {}
    for number, (split, files) in enumerate(coco_set.splits.items()):
        names = [f"{1000 * number + k:012d}{suffix}" for k in range(counts[split])]
        (folder / files.images).mkdir(exist_ok=True)
        for k, name in enumerate(names):
            Image.new("RGB", (60, 40), (40 * number, k, 90)).save(folder / files.images / name)
        for content, document in coco_documents(number, names).items():
            (folder / "annotations" / f"{content}_{files.suffix}.json").write_text(json.dumps(document))
            written[content, split] = document
    return written


def set_counts(monkeypatch, coco_set, counts):
    """Set the published number of photos in the splits of a data set."""
    for split, count in counts.items():
        monkeypatch.setitem(coco_set.splits, split, dataclasses.replace(coco_set.splits[split], num_images=count))
