"""What can be chosen when a data set is prepared. Nothing here imports numpy, so that --help answers at once."""

DRAWN_FORMATS = ("geojson", "label-tiff", "coco")
# What a mask of Herlev marks: the value that each part of a cell gets in it.
HERLEV_TARGETS = {"nucleus": {"nucleus": 1}, "cytoplasm": {"cytoplasm": 1}, "both": {"nucleus": 1, "cytoplasm": 2}}
SAMPLE_COUNTS = {"train": 64, "valid": 16, "test": 16}  # images in the bundled sample
