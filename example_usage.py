# %% [markdown]
# # All classes from Python
#
# On the bundled sample, in under a minute on two CPU cores. This file is a script (`python example_usage.py`) and a
# notebook: Jupyter with jupytext and VS Code open it as cells. `docs/notebooks.md` says more.

# %%
import tempfile
from pathlib import Path

import torch

from images.report import check_dataset
from inference import Predictor
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, count_parameters

torch.manual_seed(0)
DATA_ROOT = "data"
OUTPUT = Path(tempfile.mkdtemp())  # figures and checkpoints, to be looked at and thrown away

# %% [markdown]
# ## The data
# In a notebook the last line of a cell shows its table or figure; a script saves figures with `savefig`.

# %%
print(check_dataset(DATA_ROOT))
dataset = PapSmearDataset(DATA_ROOT, split="train", target_size=256, augment_probability=0.3)
sample = dataset[0]
print(f"\n{sample['name']}: image {tuple(sample['image'].shape)}, mask {tuple(sample['mask'].shape)}, "
      f"{sample['mask'].mean():.1%} foreground")
dataset.show(0).savefig(OUTPUT / "sample.png")
dataset.update_target_size(128)
print(f"after update_target_size(128): {tuple(dataset[0]['image'].shape)}")
dataset.show(0)

# %% [markdown]
# ## The network
# It is constructed at stage 1; `set_stage` touches no weight.

# %%
model = ProgressiveUNet(in_channels=1, out_channels=1, base_channels=8)
print(f"\nProgressiveUNet with 8 base channels: {count_parameters(model):,} parameters")
image = torch.rand(1, 1, 256, 256)
for stage in STAGE_RESOLUTIONS:
    model.set_stage(stage)
    with torch.no_grad():
        scales = model.eval()(image, return_all_scales=True)
    print(f"stage {stage}: trained at {model.resolution}; a 256x256 image gives logits at "
          f"{[scale.shape[-1] for scale in scales]}")
print(model)
model  # noqa: B018 (the table of a notebook)

# %% [markdown]
# ## Training
# One epoch a stage: far too short to be good, long enough to be seen working. In a notebook a figure of the curves
# follows.

# %%
loaders = create_progressive_dataloaders(DATA_ROOT, batch_sizes={32: 16, 64: 16, 128: 8, 256: 8})
model.set_stage(1)
trainer = ProgressiveTrainer(model, epochs_per_stage=1, output_dir=OUTPUT / "run")
for stage, resolution in STAGE_RESOLUTIONS.items():
    train_loader, valid_loader, _ = loaders[resolution]
    trainer.set_stage(stage)
    train_metrics = trainer.train_epoch(train_loader, epoch=0)
    valid_metrics = trainer.validate_epoch(valid_loader, epoch=0)
    trainer.record(train_metrics, valid_metrics)  # selects the best epoch, and writes as there is an output_dir
    print(f"stage {stage}: train loss {train_metrics['loss']:.3f}, valid Dice {valid_metrics['dice']:.3f}")
print(trainer)
trainer  # noqa: B018 (the table of a notebook)

# %% [markdown]
# ## Prediction
# A checkpoint says itself how it wants to be used.

# %%
predictor = Predictor(OUTPUT / "run/best_stage_4.pth")
print(predictor)
probability = predictor.predict("data/test/images/test_000.png")
print(f"probabilities {probability.shape}, up to {probability.max():.2f}")
print(f"figures and checkpoints are in {OUTPUT}")
predictor.show("data/test/images/test_000.png")
