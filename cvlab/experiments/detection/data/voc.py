"""VOC's layout: Annotations/NAME.xml, JPEGImages/NAME.jpg and lists of names in ImageSets/Main; or XML beside photos.

Source: Everingham et al., 2010, "The PASCAL visual object classes challenge"; pixels count from 1, and xmax and ymax
are the last ones inside. XML is read without document types and entities, bounded in size and depth.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations as data_annotations
from cvlab.experiments.detection.data.annotations import SPLITS, Annotated, Layout, Marked

MAX_DEPTH = 16
LISTS = Path("ImageSets", "Main")
PAIRS = (("Annotations", "JPEGImages"), ("annotations", "images"), ("Annotations", "Images"), (".", "."))
CORRECT = "correct the annotation, or get it again"


@dataclass(slots=True)
class Node:
    """An element of an XML file, and the line on which it begins."""

    tag: str
    line: int
    text: str = ""
    children: "list[Node]" = field(default_factory=list)

    def find(self, tag: str) -> "Node | None":
        """Return the first child of a name."""
        return next((child for child in self.children if child.tag == tag), None)

    def word(self, tag: str) -> str | None:
        """Return the text of the first child of a name."""
        found = self.find(tag)
        return None if found is None else found.text.strip()


def parse(path: Path) -> Node:
    """Read an XML file. DataError with file and line where it is broken, or has what an annotation never needs."""
    raw = data_annotations.read_bytes(path, missing="every photo of the list needs its annotation")
    top = Node("", 0)
    stack = [top]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        if len(stack) > MAX_DEPTH:
            refuse(f"nested deeper than {MAX_DEPTH} levels")
        node = Node(tag, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    def refuse(what: str) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: {what}", CORRECT)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = lambda *_: refuse("a document type is not allowed")
    parser.EntityDeclHandler = lambda *_: refuse("an entity is not allowed")
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: not valid XML: {expat.ErrorString(error.code)}", CORRECT) from error
    except (ValueError, LookupError) as error:  # an encoding that nobody knows
        raise DataError(f"{path}:{parser.CurrentLineNumber}: not valid XML: {error}", CORRECT) from error
    return top.children[0]


def read(path: Path, image: Path) -> Annotated:
    """Read the annotation of a photo."""
    root = parse(path)
    if root.tag != "annotation":
        raise DataError(f"{path}:{root.line}: <{root.tag[:40]}> where <annotation> is expected", CORRECT)
    objects = [node for node in root.children if node.tag == "object"]
    marked = [_marked(node, f"{path}:{node.line}: object {k}", path, k) for k, node in enumerate(objects, 1)]
    return Annotated(image, path, tuple(marked), _size(root))


def _size(root: Node) -> tuple[int, int] | None:
    """Return the size that an annotation claims, where it claims one: 0 x 0 says nothing."""
    size = root.find("size")
    sides = [size.word(key) or "" for key in ("width", "height")] if size is not None else []
    if len(sides) < 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        return None
    width, height = int(sides[0]), int(sides[1])
    return (width, height) if width and height else None


def _marked(node: Node, place: str, path: Path, k: int) -> Marked:
    name = node.word("name")
    if not name:
        raise DataError(f"{place} has no name", CORRECT)
    box = node.find("bndbox")
    if box is None:
        raise DataError(f"{place} has no bndbox", CORRECT)
    values = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        found = box.find(key)
        if found is None:
            raise DataError(f"{path}:{box.line}: object {k} has no {key}", CORRECT)
        values.append(data_annotations.number(found.text.strip(), f"{path}:{found.line}: object {k}", key))
    xmin, ymin, xmax, ymax = values
    difficult = node.word("difficult") or "0"
    if difficult not in ("0", "1"):
        raise DataError(f"{place}: difficult is {difficult[:40]!r}, not 0 or 1", CORRECT)
    if xmax <= xmin or ymax <= ymin:  # a point or a line, which real sets have where somebody has clicked
        xmax, ymax = xmin - 1, ymin - 1
    return Marked(place, name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def fits(folder: Path) -> bool:
    """Whether a folder has VOC's layout, or XML files beside photos, perhaps in a folder for each split."""
    return _pair(folder) is not None or any(_pair(path) for path in _split_folders(folder).values())


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Return where a folder has its annotations and its photos."""
    for annotations, images in PAIRS:
        if (folder / images).is_dir() and next((folder / annotations).glob("*.xml"), None) is not None:
            return folder / annotations, folder / images
    return None


def _split_folders(folder: Path) -> dict[str, Path]:
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    return {split: child for child in children if (split := data_annotations.split_of(child.name))}


def read_folder(folder: Path, classes: tuple[str, ...] | None = None) -> Layout:
    """Read all photos of a folder: those of ImageSets/Main, else of its split folders, else all as `train`."""
    pair = _pair(folder)
    if pair is None:
        pairs = {split: _pair(path) for split, path in _split_folders(folder).items()}
        return Layout("VOC", {split: _all_of(*found) for split, found in pairs.items() if found}, classes)
    if not (folder / LISTS).is_dir():
        return Layout("VOC", {"train": _all_of(*pair)}, classes)
    images = data_annotations.photos_in(pair[1])
    lists = {split: folder / LISTS / f"{split}.txt" for split in SPLITS}
    if not lists["train"].is_file():
        raise DataError(f"{lists['train']}: no such file", "it lists the names of the photos to train on")
    return Layout("VOC", {s: _of_list(path, *pair, images) for s, path in lists.items() if path.is_file()}, classes)


def _of_list(path: Path, annotations: Path, folder: Path, images: dict[str, Path]) -> list[Annotated]:
    found: dict[str, Annotated] = {}
    for number, name in data_annotations.read_lines(path):
        if name in found:
            raise DataError(f"{path}:{number}: {name} for the second time", "keep one of the two")
        if name not in images:
            raise DataError(f"{path}:{number}: {folder} has no photo {name}", "get the set again, or correct the list")
        found[name] = read(annotations / f"{name}.xml", images[name])
    return list(found.values())


def _all_of(annotations: Path, folder: Path) -> list[Annotated]:
    images = data_annotations.photos_in(folder)
    found = []
    for path in sorted(annotations.glob("*.xml")):
        if path.stem not in images:
            raise DataError(f"{path}: {folder} has no photo {path.stem}", "add the photo, or remove the annotation")
        found.append(read(path, images[path.stem]))
    return found
