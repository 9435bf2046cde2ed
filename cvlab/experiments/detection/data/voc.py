"""Read boxes in VOC's format: Annotations/*.xml, JPEGImages/* and ImageSets/Main/SPLIT.txt; or XML beside photos.

References: Everingham et al., 2010, "The PASCAL visual object classes challenge". Pixels count from 1, and xmax and
ymax are inclusive. XML is parsed without document types and entities, and bounded in size and depth.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from cvlab.data import files
from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import SPLITS, AnnotationSet, ImageAnnotation, ObjectAnnotation

MAX_DEPTH = 16
SPLIT_LISTS = Path("ImageSets", "Main")
FOLDER_PAIRS = (  # annotations, images
    ("Annotations", "JPEGImages"),
    ("annotations", "images"),
    ("Annotations", "Images"),
    (".", "."),
)
HINT = "correct the annotation, or download it again"


@dataclass(slots=True)
class Element:
    """An element of an XML file, and the line on which it starts."""

    tag: str
    line: int
    text: str = ""
    children: "list[Element]" = field(default_factory=list)

    def find(self, tag: str) -> "Element | None":
        """Return the first child called `tag`."""
        return next((child for child in self.children if child.tag == tag), None)

    def text_of(self, tag: str) -> str | None:
        """Return the text of the first child called `tag`."""
        child = self.find(tag)
        return None if child is None else child.text.strip()


def parse_xml(path: Path) -> Element:
    """Parse an XML file. DataError with file and line if it is broken, or has what no annotation needs."""
    raw = files.read_bytes(path, hint="every photo of the list needs its annotation")
    document = Element("", 0)
    stack = [document]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        if len(stack) > MAX_DEPTH:
            reject(f"nested deeper than {MAX_DEPTH} levels")
        node = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def text(data: str) -> None:
        stack[-1].text += data

    def reject(problem: str) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: {problem}", HINT)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = lambda *_: reject("a document type is not allowed")
    parser.EntityDeclHandler = lambda *_: reject("an entity is not allowed")
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: not valid XML: {expat.ErrorString(error.code)}", HINT) from error
    except (ValueError, LookupError) as error:  # an unknown encoding
        raise DataError(f"{path}:{parser.CurrentLineNumber}: not valid XML: {error}", HINT) from error
    return document.children[0]


def read(path: Path, image: Path) -> ImageAnnotation:
    """Read the annotation of an image."""
    root = parse_xml(path)
    if root.tag != "annotation":
        raise DataError(f"{path}:{root.line}: <{root.tag[:40]}> where <annotation> is expected", HINT)
    elements = [child for child in root.children if child.tag == "object"]
    objects = [_parse_object(element, path, k) for k, element in enumerate(elements, 1)]
    return ImageAnnotation(image, path, tuple(objects), _parse_size(root))


def _parse_size(root: Element) -> tuple[int, int] | None:
    """Return the image size that an annotation claims, if it does; 0 x 0 counts as none."""
    size = root.find("size")
    sides = [size.text_of(key) or "" for key in ("width", "height")] if size is not None else []
    if len(sides) < 2 or not all(side.isdecimal() and len(side) < 9 for side in sides):
        return None
    width, height = int(sides[0]), int(sides[1])
    return (width, height) if width and height else None


def _parse_object(element: Element, path: Path, k: int) -> ObjectAnnotation:
    """Return object number `k` of a file."""
    location = f"{path}:{element.line}: object {k}"
    name = element.text_of("name")
    if not name:
        raise DataError(f"{location} has no name", HINT)
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{location} has no bndbox", HINT)
    values = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        edge = box.find(key)
        if edge is None:
            raise DataError(f"{path}:{box.line}: object {k} has no {key}", HINT)
        values.append(annotations.parse_number(edge.text.strip(), f"{path}:{edge.line}: object {k}", key))
    xmin, ymin, xmax, ymax = values
    difficult = element.text_of("difficult") or "0"
    if difficult not in ("0", "1"):
        raise DataError(f"{location}: difficult is {difficult[:40]!r}, not 0 or 1", HINT)
    if xmax <= xmin or ymax <= ymin:  # a point or a line, as stray clicks leave in real data sets
        xmax, ymax = xmin - 1, ymin - 1
    return ObjectAnnotation(location, name, (xmin - 1, ymin - 1, xmax, ymax), difficult == "1")


def matches(folder: Path) -> bool:
    """Whether a folder has VOC's layout, or XML files beside photos, perhaps in a folder for each split."""
    return _find_folders(folder) is not None or any(_find_folders(path) for path in _split_folders(folder).values())


def _find_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of a data set's annotations and of its images."""
    for annotation_folder, image_folder in FOLDER_PAIRS:
        has_xml = next((folder / annotation_folder).glob("*.xml"), None) is not None
        if (folder / image_folder).is_dir() and has_xml:
            return folder / annotation_folder, folder / image_folder
    return None


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders named like splits."""
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    return {split: child for child in children if (split := annotations.split_named(child.name))}


def read_folder(folder: Path, classes: tuple[str, ...] | None = None) -> AnnotationSet:
    """Read all images of a folder: those of ImageSets/Main, else of its split folders, else all as `train`."""
    folders = _find_folders(folder)
    if folders is None:
        by_split = {split: _find_folders(path) for split, path in _split_folders(folder).items()}
        return AnnotationSet("VOC", {split: _read_all(*pair) for split, pair in by_split.items() if pair}, classes)
    if not (folder / SPLIT_LISTS).is_dir():
        return AnnotationSet("VOC", {"train": _read_all(*folders)}, classes)
    images = annotations.images_by_stem(folders[1])
    lists = {split: folder / SPLIT_LISTS / f"{split}.txt" for split in SPLITS}
    if not lists["train"].is_file():
        raise DataError(f"{lists['train']}: no such file", "it lists the names of the photos to train on")
    splits = {split: _read_list(path, *folders, images) for split, path in lists.items() if path.is_file()}
    return AnnotationSet("VOC", splits, classes)


def _read_list(
    path: Path, annotation_folder: Path, image_folder: Path, images: dict[str, Path]
) -> list[ImageAnnotation]:
    """Read the images that a list in ImageSets/Main names."""
    by_name: dict[str, ImageAnnotation] = {}
    for number, name in files.read_lines(path):
        if name in by_name:
            raise DataError(f"{path}:{number}: {name} for the second time", "keep one of the two")
        if name not in images:
            hint = "download the data set again, or correct the list"
            raise DataError(f"{path}:{number}: {image_folder} has no photo {name}", hint)
        by_name[name] = read(annotation_folder / f"{name}.xml", images[name])
    return list(by_name.values())


def _read_all(annotation_folder: Path, image_folder: Path) -> list[ImageAnnotation]:
    """Read all annotations of a folder."""
    images = annotations.images_by_stem(image_folder)
    annotated = []
    for path in sorted(annotation_folder.glob("*.xml")):
        if path.stem not in images:
            hint = "add the photo, or remove the annotation"
            raise DataError(f"{path}: {image_folder} has no photo {path.stem}", hint)
        annotated.append(read(path, images[path.stem]))
    return annotated
