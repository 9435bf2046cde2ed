"""Read boxes in VOC's format: Annotations/*.xml, JPEGImages/* and ImageSets/Main/SPLIT.txt; or XML beside photos.

References: Everingham et al., 2010, "The PASCAL visual object classes challenge". Pixels count from 1, and xmax and
ymax are inclusive. XML is parsed without document types and entities, and bounded in size, depth and elements. What an
annotation program writes differently is repaired or left out, and reported.
"""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from xml.parsers import expat

from cvlab.data import files, photo_paths
from cvlab.errors import DataError
from cvlab.experiments.detection.data import annotations
from cvlab.experiments.detection.data.annotations import (
    SPLIT_ALIASES,
    SPLITS,
    AnnotationSet,
    ImageAnnotation,
    Irregularities,
    ObjectAnnotation,
    PhotoIndex,
)

MAX_DEPTH = 16
MAX_ELEMENTS = 100_000
SPLIT_LISTS = Path("ImageSets", "Main")
WHOLE_LISTS = ("trainval", "default", "all")  # of all photos that are not for testing; `default` is CVAT's
ANNOTATION_FOLDERS = ("annotations", "annotation", "annots", "annot", "xmls", "xml", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img", "photos", "pictures")
LIST_FLAGS = ("-1", "0", "1")
NOT_ANNOTATED = "photos without an annotation left out"
HINT = "correct the annotation, or download it again"


@dataclass(slots=True)
class Element:
    """An element of an XML file, and the line on which it starts."""

    tag: str
    line: int
    pieces: list[str] = field(default_factory=list)
    children: "list[Element]" = field(default_factory=list)

    @property
    def text(self) -> str:
        """Return the text in the element itself, without white space around it."""
        return "".join(self.pieces).strip()

    def find(self, tag: str) -> "Element | None":
        """Return the first child called `tag`."""
        return next((child for child in self.children if child.tag == tag), None)

    def text_of(self, tag: str) -> str | None:
        """Return the text of the first child called `tag`."""
        child = self.find(tag)
        return None if child is None else child.text


def parse_xml(path: Path) -> Element:
    """Parse an XML file. DataError with file and line if it is broken, or has what no annotation needs."""
    raw = files.read_bytes(path, hint="every photo of the list needs its annotation")
    document = Element("", 0)
    stack = [document]
    num_elements = 0
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start(tag: str, _: dict[str, str]) -> None:
        nonlocal num_elements
        num_elements += 1
        if len(stack) > MAX_DEPTH:
            reject(f"nested deeper than {MAX_DEPTH} levels")
        if num_elements > MAX_ELEMENTS:
            reject(f"more than {MAX_ELEMENTS} elements")
        node = Element(tag, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def add_text(data: str) -> None:
        stack[-1].pieces.append(data)

    def reject(problem: str) -> None:
        raise DataError(f"{path}:{parser.CurrentLineNumber}: {problem}", HINT)

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = add_text
    parser.StartDoctypeDeclHandler = lambda *_: reject("a document type is not allowed")
    parser.EntityDeclHandler = lambda *_: reject("an entity is not allowed")
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: not valid XML: {expat.ErrorString(error.code)}", HINT) from error
    except (ValueError, LookupError) as error:  # an unknown encoding
        raise DataError(f"{path}:{parser.CurrentLineNumber}: not valid XML: {error}", HINT) from error
    return document.children[0]


def read(path: Path, image: Path, irregularities: Irregularities | None = None) -> ImageAnnotation:
    """Read the annotation of an image; what is repaired or left out is added to `irregularities`."""
    return _to_annotation(parse_xml(path), path, image, Irregularities() if irregularities is None else irregularities)


def _to_annotation(root: Element, path: Path, image: Path, irregularities: Irregularities) -> ImageAnnotation:
    """Make an annotation of the parsed file of an image."""
    if root.tag != "annotation":
        raise DataError(f"{path}:{root.line}: <{root.tag[:40]}> where <annotation> is expected", HINT)
    elements = [child for child in root.children if child.tag == "object"]
    parsed = [_parse_object(element, path, irregularities) for element in elements]
    objects = tuple(obj for obj in parsed if obj is not None)
    return ImageAnnotation(image, path, objects, _parse_size(root))


def _parse_size(root: Element) -> tuple[int, int] | None:
    """Return the image size that an annotation claims, if it does; 0 x 0 counts as none."""
    size = root.find("size")
    sides = [annotations.parse_number(size.text_of(key)) for key in ("width", "height")] if size is not None else []
    if not sides or not all(side is not None and 0 < side < 10**8 for side in sides):
        return None
    width, height = (int(side) for side in sides if side is not None)
    return width, height


def _parse_object(element: Element, path: Path, irregularities: Irregularities) -> ObjectAnnotation | None:
    """Return an object of a file; None if it has no class or no box."""
    location = f"{path}:{element.line}"
    name = element.text_of("name")
    if not name:
        irregularities.add("objects without a name left out", location)
        return None
    box = element.find("bndbox")
    if box is None:
        irregularities.add("objects without a bndbox left out", location)
        return None
    edges = [annotations.parse_number(box.text_of(key)) for key in ("xmin", "ymin", "xmax", "ymax")]
    xmin, ymin, xmax, ymax = (0.0 if edge is None else edge for edge in edges)
    if None in edges:
        irregularities.add("objects whose box lacks a number left out", f"{path}:{box.line}")
        return None
    difficult = annotations.parse_flag(element.text_of("difficult"))
    if difficult is None:
        irregularities.add("flags `difficult` that are neither 0 nor 1 read as 0", location)
    if xmax <= xmin or ymax <= ymin:  # a point or a line, as stray clicks leave in real data sets
        xmax, ymax = xmin - 1, ymin - 1
    return ObjectAnnotation(location, name, (xmin - 1, ymin - 1, xmax, ymax), bool(difficult))


def matches(folder: Path) -> bool:
    """Whether a folder has VOC's layout, or XML files beside photos, perhaps in a folder for each split."""
    return _find_folders(folder) is not None or any(_find_folders(path) for path in _split_folders(folder))


def _find_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of a data set's annotations and of its images."""
    by_name = {path.name.lower(): path for path in reversed(files.subfolders(folder))}
    annotation_folders = [by_name[name] for name in ANNOTATION_FOLDERS if name in by_name]
    image_folders = [by_name[name] for name in IMAGE_FOLDERS if name in by_name]
    for annotation_folder in annotation_folders:
        if files.list_files(annotation_folder, (".xml",), is_recursive=True):
            return annotation_folder, image_folders[0] if image_folders else folder
    return (folder, image_folders[0] if image_folders else folder) if files.list_files(folder, (".xml",)) else None


def _split_folders(folder: Path) -> list[Path]:
    """Return the subfolders named like splits."""
    return [child for child in files.subfolders(folder) if annotations.split_named(child.name)]


def read_folder(folder: Path, classes: tuple[str, ...] | None = None) -> AnnotationSet:
    """Read all images of a folder: those of ImageSets/Main, else of its split folders, else all as `train`."""
    irregularities = Irregularities()
    splits: dict[str, list[ImageAnnotation]] = {}
    folders = _find_folders(folder)
    if folders is not None:
        splits = _Reader(*folders, irregularities).read(_split_lists(folder))
    else:
        for path in _split_folders(folder):
            split = annotations.split_named(path.name)
            pair = _find_folders(path)
            if split is not None and pair is not None:
                annotated = _Reader(*pair, irregularities).read({})
                splits.setdefault(split, []).extend(annotated["train"])
    return AnnotationSet("VOC", splits, classes, irregularities)


def _split_lists(folder: Path) -> dict[str, Path]:
    """Return the list of each split in ImageSets/Main. DataError if there are lists, but none to train on."""
    lists_folder = folder / SPLIT_LISTS
    if not lists_folder.is_dir():
        return {}
    lists = {path.stem.lower(): path for path in files.list_files(lists_folder, (".txt",))}
    by_split = {split: lists[name] for split in SPLITS for name in SPLIT_ALIASES[split][::-1] if name in lists}
    whole = next((lists[name] for name in WHOLE_LISTS if name in lists), None)
    if "train" not in by_split and whole is not None:
        by_split = {"train": whole, **by_split}
    if lists and "train" not in by_split:
        problem = f"{lists_folder / 'train.txt'}: no such file"
        raise DataError(problem, "it lists the names of the photos to train on; trainval.txt and default.txt do too")
    return by_split


class _Reader:
    """Reads the annotations of a pair of folders, and pairs them with their photos."""

    def __init__(self, annotation_folder: Path, image_folder: Path, irregularities: Irregularities) -> None:
        is_flat = annotation_folder == image_folder
        self.irregularities, self.annotation_folder = irregularities, annotation_folder
        self.photos = PhotoIndex(image_folder, is_recursive=not is_flat)
        paths = files.list_files(annotation_folder, (".xml",), is_recursive=not is_flat)
        self.xml_of = {str(path.relative_to(annotation_folder).with_suffix("")): path for path in reversed(paths)}
        self.used: set[Path] = set()

    def read(self, lists: dict[str, Path]) -> dict[str, list[ImageAnnotation]]:
        """Read the annotations that lists name, without lists those of subfolders named like splits, else `train`."""
        splits: dict[str, list[ImageAnnotation]] = {}
        if lists:
            listed = {split: self._read_list(path) for split, path in lists.items()}
            if lists["train"].stem.lower() in WHOLE_LISTS:
                others = {name for split in listed if split != "train" for name in listed[split]}
                listed["train"] = {name: where for name, where in listed["train"].items() if name not in others}
            for split, names in listed.items():
                annotated = [self._read_listed(name, location) for name, location in names.items()]
                splits[split] = [annotation for annotation in annotated if annotation is not None]
        else:
            for key, path in sorted(self.xml_of.items(), key=lambda item: item[1]):
                annotation = self._read_xml(key, path)
                folder = path.relative_to(self.annotation_folder).parts[:-1]
                split = next((s for part in folder if (s := annotations.split_named(part))), "train")
                splits.setdefault(split, []).extend([annotation] if annotation is not None else [])
        self._report_unused(has_lists=bool(lists))
        return splits

    def _read_list(self, path: Path) -> dict[str, str]:
        """Return the names in a list of ImageSets/Main, with their locations."""
        names: dict[str, str] = {}
        for number, line in files.read_lines(path):
            location = f"{path}:{number}"
            name = self._listed_name(line)
            if name != line:
                self.irregularities.add("lines of ImageSets with more than a name, whose name was taken", location)
            if name in names:
                self.irregularities.add("names listed twice, read once", location)
            names.setdefault(name, location)
        return names

    def _listed_name(self, line: str) -> str:
        """Return the name of the photo in a line of a list: without a flag (-1, 0, 1) and a suffix."""
        plain, _, flag = line.rpartition(" ")
        for candidate in (line, plain.strip()) if flag in LIST_FLAGS else (line,):
            path = PurePosixPath(candidate.replace("\\", "/"))
            bare = path.with_suffix("") if path.suffix.lower() in photo_paths.SUFFIXES else path
            names = [str(path), str(bare), path.name, bare.name]
            known = next((name for name in names if name in self.xml_of), None)
            photo = self.photos.find(*names) if known is None else None
            if known is not None or photo is not None:
                return known or str(bare)
        return line

    def _read_listed(self, name: str, location: str) -> ImageAnnotation | None:
        """Read the annotation of a listed photo; None if it or the photo is missing."""
        path = self.xml_of.get(name)
        if path is not None:
            return self._read_xml(name, path, location)
        photo = self.photos.find(name)
        if photo is None:
            self.irregularities.add(f"listed photos that are not in {self.photos.folder} left out", location)
        else:
            self.used.add(photo)
            self.irregularities.add(NOT_ANNOTATED, photo)
        return None

    def _read_xml(self, key: str, path: Path, location: str = "") -> ImageAnnotation | None:
        """Read a file; None if its photo is missing. It is named like the file, or as the file says."""
        root = parse_xml(path)
        file_name = PureWindowsPath(root.text_of("filename") or "").name
        has_same_stem = Path(file_name).stem == path.stem
        names = (str(Path(key).with_name(file_name)), file_name) if file_name and has_same_stem else ()
        photo = self.photos.find(*names, key, path.stem, *([file_name] if file_name else []))
        if photo is None:
            where = location or str(path)
            self.irregularities.add(f"annotations whose photo is not in {self.photos.folder} left out", where)
            return None
        self.used.add(photo)
        return _to_annotation(root, path, photo, self.irregularities)

    def _report_unused(self, has_lists: bool) -> None:
        """Report the photos that no annotation and no list names."""
        named = {(photo.parent, photo.stem) for photo in self.used}
        reported = set(self.irregularities.cases.get(NOT_ANNOTATED, []))
        for photo in [*self.photos.photos, *self.photos.duplicates]:
            if photo in self.used or str(photo) in reported:
                continue
            key = str(photo.relative_to(self.photos.folder).with_suffix(""))
            if (photo.parent, photo.stem) in named:
                self.irregularities.add("photos beside another one of the same name left out", photo)
            elif has_lists and (key in self.xml_of or photo.stem in self.xml_of):
                self.irregularities.add("photos that no list of ImageSets names left out", photo)
            else:
                self.irregularities.add(NOT_ANNOTATED, photo)
