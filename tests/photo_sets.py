"""Class folders made from real photos: `python -m tests.photo_sets FOLDER` links them below FOLDER.

`fruit` has photos of the fruit set that show one kind of fruit, `sports` those of COCO whose captions name one sport.
"""

import collections
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

SPORTS = {
    **{name: name for name in ("tennis", "baseball", "skateboard", "surf", "snowboard", "horse", "frisbee", "kite")},
    "ski": r"\bski",
}
MIN_CAPTIONS = 3  # number of captions, of five, that name the sport


def link(photo, folder):
    """Link a photo into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / photo.name).symlink_to(photo.resolve())


def fruit(data, target):
    """Link the photos of the fruit set that show one kind of fruit, by split and kind."""
    root = data / "VOC" / "fruit"
    for split in ("train", "val", "test"):
        listing = root / "ImageSets" / "Main" / f"{split}.txt"
        for name in listing.read_text().split() if listing.is_file() else ():
            objects = ET.parse(root / "Annotations" / f"{name}.xml").getroot().iter("object")
            kinds = {annotation.findtext("name") for annotation in objects}
            if len(kinds) == 1:
                link(next((root / "JPEGImages").glob(f"{name}.*")), target / split / kinds.pop())
    return target


def sports(data, target):
    """Link the photos of COCO of which most captions name one sport, by split and sport."""
    root = data / "coco_people"
    for split in ("train", "val", "test"):
        document = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
        captions = collections.defaultdict(list)
        for row in document["annotations"]:
            captions[row["image_id"]].append(row["caption"].lower())
        for image in document["images"]:
            texts = captions[image["id"]]
            counts = {name: sum(bool(re.search(word, text)) for text in texts) for name, word in SPORTS.items()}
            named = [name for name, count in counts.items() if count >= MIN_CAPTIONS]
            if len(named) == 1:
                link(root / "images" / image["file_name"], target / split / named[0])
    return target


if __name__ == "__main__":
    fruit(Path(os.environ["CVLAB_DATA"]), Path(sys.argv[1]) / "fruit")
    sports(Path(os.environ["CVLAB_DATA"]), Path(sys.argv[1]) / "sports")
