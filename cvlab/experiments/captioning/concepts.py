"""What photos show as an object detector and a classifier name it, and the words of captions for it.

The minimum areas are those from which on most people who captioned COCO's photos mention an object: a bus almost
always, a chair hardly ever. Indices of ImageNet are those of `cvlab.data.imagenet`.
"""

from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Concept:
    """A kind of thing.

    Attributes:
        name: Its name: that of the detector's class if there is one.
        synonyms: The words of captions that name it.
        group: Things of a group are easily taken for each other; empty: it is in no group.
        min_area: The fraction of the photo that a detected box covers at least; None: boxes do not count.
        imagenet: Indices of the ImageNet classes that are kinds of it.
    """

    name: str
    synonyms: tuple[str, ...]
    group: str = ""
    min_area: float | None = None
    imagenet: tuple[int, ...] = ()


def _concept(
    name: str, synonyms: str = "", *classes: int | range, group: str = "", min_area: float | None = None
) -> Concept:
    ranges = (each if isinstance(each, range) else (each,) for each in classes)
    return Concept(name, tuple((synonyms or f"{name} {name}s").split()), group, min_area, tuple(chain(*ranges)))


_BIRDS = (range(7, 25), range(80, 101), range(127, 147))
ANIMALS = tuple(
    _concept(name, synonyms, *classes, group="animal", min_area=min_area)
    for name, synonyms, classes, min_area in (
        ("bird", "bird birds duck ducks seagull seagulls swan swans goose geese pigeons pelican", _BIRDS, 0.0),
        ("cat", "cat cats kitten kitty", (range(281, 286),), 0.01),
        (
            "dog",
            "dog dogs puppy puppies poodle retriever collie terrier greyhound greyhounds",
            (range(151, 269),),
            0.01,
        ),
        ("horse", "horse horses pony ponies", (339,), 0.01),
        ("sheep", "sheep lamb lambs goat goats", (348, 349, 350), 0.01),
        ("cow", "cow cows cattle bull bulls", (345, 346, 347), 0.01),
        ("elephant", "", (101, 385, 386), 0.01),
        ("bear", "", (range(294, 298),), 0.05),
        ("zebra", "", (340,), 0.01),
        ("giraffe", "", (), 0.01),
        ("fish", "fish fishes", (0, 1, range(389, 398)), None),
        ("frog", "", (range(30, 33),), None),
        ("snake", "", (range(52, 69),), None),
        ("insect", "insect insects bug bugs bee bees butterfly", (range(300, 327),), None),
        ("rabbit", "rabbit rabbits bunny", (range(330, 333),), None),
        ("squirrel", "", (335,), None),
        ("pig", "", (341, 342), None),
        ("camel", "", (354,), None),
        ("monkey", "monkey monkeys", (range(365, 385),), None),
        ("panda", "panda pandas", (388,), None),
        ("tiger", "", (292,), None),
        ("leopard", "", (288, 289), None),
        ("crocodile", "", (49, 50), None),
        ("seal", "", (150,), None),
        (
            "animal",
            "animal animals creature",
            (
                *(range(25, 30), range(33, 49), 51, range(102, 108), range(269, 281), 286, 287, 290, 291, 293),
                *(298, 299, 334, 336, 337, 338, 343, 344, 351, 352, 353, range(355, 365), 387),
            ),
            None,
        ),
    )
)
VEHICLES = tuple(
    _concept(name, synonyms, *classes, group="vehicle", min_area=min_area)
    for name, synonyms, classes, min_area in (
        ("bicycle", "bicycle bicycles bike bikes", (444, 671), 0.05),
        ("car", "car cars taxi van jeep vehicle", (436, 468, 511, 609, 627, 656, 661, 751, 817), 0.2),
        ("motorbike", "motorcycle motorcycles motorbike motorbikes scooter moped bike", (665, 670), 0.05),
        ("aeroplane", "airplane airplanes plane planes jet", (404, 895), 0.01),
        ("bus", "bus buses", (654, 779, 874), 0.05),
        ("train", "train trains trolley tram subway locomotive", (466, 547, 705, 820, 829), 0.05),
        (
            "truck",
            "truck trucks van vehicle trailer firetruck ambulance",
            (407, 555, 569, 675, 717, 734, 757, 864, 867),
            0.2,
        ),
        (
            "boat",
            "boat boats ship ships canoe kayak raft sailboat rowboat",
            (472, 484, 510, 554, 576, 625, 628, 780, 814, 871, 914),
            0.01,
        ),
    )
)
OTHERS = (
    _concept(
        "person",
        "person people man men woman women boy boys girl girls child children kid kids lady guy guys baby toddler "
        "player players surfer skier skateboarder snowboarder crowd family couple team rider biker group bride groom",
        982,
        min_area=0.05,
    ),
    _concept("fire hydrant", "hydrant", min_area=0.05),
    _concept("stop sign", "sign signs", 919, min_area=0.05),
    _concept("traffic light", "light lights signal", 920),
    _concept("parking meter", "meter meters", 704, min_area=0.05),
    _concept("bench", "bench benches", 703, min_area=0.2),
    _concept("umbrella", "", 879, min_area=0.05),
    _concept("tie", "tie ties", min_area=0.05),
    _concept("suitcase", "suitcase suitcases luggage", min_area=0.05),
    _concept("frisbee", "frisbee frisbees", min_area=0.01),
    _concept("skis", "skis skiing ski skier skiers", min_area=0.01),
    _concept("snowboard", "snowboard snowboarder snowboarding", min_area=0.05),
    _concept("kite", "kite kites", min_area=0.01),
    _concept("baseball bat", "bat baseball batter", min_area=0.01),
    _concept("baseball glove", "glove baseball catcher", min_area=0.01),
    _concept("skateboard", "skateboard skateboarder skateboarding skateboards", min_area=0.01),
    _concept("surfboard", "surfboard surfboards surfing surfer surf", min_area=0.01),
    _concept("tennis racket", "racket racquet tennis", 752, min_area=0.01),
    _concept("bottle", "bottle bottles wine beer", 440, 720, 737, 898, 907),
    _concept("wine glass", "wine glass glasses", min_area=0.2),
    _concept("cup", "cup cups mug", 504, 968, min_area=0.2),
    _concept("banana", "", 954, min_area=0.05),
    _concept("apple", "", 948, min_area=0.2),
    _concept("sandwich", "sandwich sandwiches food", 933),
    _concept("orange", "oranges fruit", 950),
    _concept("fruit", "fruit", 949, 951, 952, 953, 955, 956, 957),
    _concept("pumpkin", "", 607),
    _concept("hot dog", "hotdog hotdogs", 934),
    _concept("pizza", "pizza pizzas", 963, min_area=0.01),
    _concept("donut", "donut donuts", min_area=0.05),
    _concept("cake", "cake cakes", min_area=0.05),
    _concept("chair", "", 423, 559, 765),
    _concept("sofa", "couch sofa", 831),
    _concept("bed", "bed", 564, min_area=0.2),
    _concept("diningtable", "table tables", 532),
    _concept("toilet", "toilet toilets", 861, min_area=0.01),
    _concept("tvmonitor", "tv television monitor screen computer", 527, 664, 782, 851, min_area=0.2),
    _concept("laptop", "laptop laptops computer computers", 620, 681, min_area=0.05),
    _concept("cell phone", "cellphone phone phones cell telephone", 487, 528, 707, min_area=0.05),
    _concept("camera", "camera cameras", 732, 759),
    _concept("oven", "oven stove", 827, min_area=0.2),
    _concept("refrigerator", "refrigerator fridge", 760, min_area=0.2),
    _concept("clock", "clock clocks", 409, 530, 892, min_area=0.05),
    _concept("teddy bear", "teddy", 850, min_area=0.2),
    _concept("guitar", "guitar guitars", 402, 546),
    _concept("piano", "piano keyboard", 579, 881),
    _concept("violin", "violin", 889),
    _concept("drum", "", 541),
    _concept("instrument", "instrument instruments", 401, 432, 513, 558, 566, 593, 683, 776, 875),
    _concept("microphone", "microphone", 650),
    _concept("bridge", "bridge", 821, 839, 888),
    _concept("church", "church", 497),
    _concept("castle", "castle", 483),
    _concept("lighthouse", "lighthouse", 437),
    _concept("fountain", "", 562),
    _concept("flag", "", 557),
    _concept("rocket", "", 657, 744),
    _concept("balloon", "balloon balloons", 417),
    _concept("store", "store grocery shop", 424, 454, 582, 860),
    _concept("restaurant", "restaurant", 762),
)
CONCEPTS = (*ANIMALS, *VEHICLES, *OTHERS)
