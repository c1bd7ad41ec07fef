"""Use the classes from Python, on the bundled sample: under a minute on two CPU cores.

    python example_usage.py
"""

import torch

from images.report import check_dataset
from pap_smear_dataset import PapSmearDataset, create_progressive_dataloaders
from progressive_trainer import ProgressiveTrainer
from unet import STAGE_RESOLUTIONS, ProgressiveUNet, count_parameters

DATA_ROOT = "data"


def look_at_the_data() -> None:
    print(check_dataset(DATA_ROOT))
    dataset = PapSmearDataset(DATA_ROOT, split="train", target_size=256, augment_probability=0.3)
    sample = dataset[0]
    print(f"\n{sample['name']}: image {tuple(sample['image'].shape)}, mask {tuple(sample['mask'].shape)}, "
          f"{sample['mask'].mean():.1%} foreground")
    dataset.update_target_size(128)
    print(f"after update_target_size(128): {tuple(dataset[0]['image'].shape)}")


def look_at_the_scales(model: ProgressiveUNet) -> None:
    image = torch.rand(1, 1, 256, 256)
    for stage in STAGE_RESOLUTIONS:
        model.set_stage(stage)
        with torch.no_grad():
            scales = model.eval()(image, return_all_scales=True)
        print(f"stage {stage}: trained at {model.resolution}; a 256x256 image gives logits at "
              f"{[scale.shape[-1] for scale in scales]}")


def train_with_a_loop(model: ProgressiveUNet) -> None:
    """Grow through all stages with one epoch each; far too short to be good, long enough to be seen working."""
    loaders = create_progressive_dataloaders(DATA_ROOT, batch_sizes={32: 16, 64: 16, 128: 8, 256: 8})
    model.set_stage(1)
    trainer = ProgressiveTrainer(model, epochs_per_stage=1)
    for stage, resolution in STAGE_RESOLUTIONS.items():
        train_loader, valid_loader, _ = loaders[resolution]
        trainer.set_stage(stage)
        train_metrics = trainer.train_epoch(train_loader, epoch=0)
        valid_metrics = trainer.validate_epoch(valid_loader, epoch=0)
        trainer.record(train_metrics, valid_metrics)  # selects the best epoch, and writes if there is an output_dir
        print(f"stage {stage}: train loss {train_metrics['loss']:.3f}, valid Dice {valid_metrics['dice']:.3f}")


def main() -> None:
    torch.manual_seed(0)
    look_at_the_data()
    model = ProgressiveUNet(in_channels=1, out_channels=1, base_channels=8)
    print(f"\nProgressiveUNet with 8 base channels: {count_parameters(model):,} parameters")
    look_at_the_scales(model)
    print()
    train_with_a_loop(model)


if __name__ == "__main__":
    main()
