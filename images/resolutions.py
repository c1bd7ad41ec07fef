"""The four resolutions, in pixels a side, at which images and masks are kept and networks are trained, and the sizes of
the largest network that is built."""

RESOLUTIONS = (32, 64, 128, 256)
FINEST = RESOLUTIONS[-1]
DEFAULT_BATCH_SIZES = {32: 64, 64: 32, 128: 16, 256: 8}  # images a batch at each resolution
WIDEST = 4096        # channels at 256 pixels of a network
MOST_CHANNELS = 1024  # that a network answers with: the classes, and the boundary of nuclei if it is a target
