"""The four resolutions, in pixels a side, at which images and masks are kept and networks are trained."""

RESOLUTIONS = (32, 64, 128, 256)
FINEST = RESOLUTIONS[-1]
DEFAULT_BATCH_SIZES = {32: 64, 64: 32, 128: 16, 256: 8}  # images a batch at each resolution
