"""The arms of a study of growing: what each trains, and the two that train_papsmear.py cannot train by itself."""

import time

# Torch and all modules that need it are imported inside the functions: wrong options answer at once.

IMAGE_ONCE = "image_once"  # direct, and the image is read at the finest level alone (see `read_image_once`)
USUAL = "usual"            # the classic U-Net as people run it (see `train_as_usual`)
# Name -> options of train_papsmear.py, which takes the budget besides.
ARMS = {
    "direct": "--progressive false",
    "grown": "--shares 27,5,7,61",
    "late": "--shares 5,9,34,52",
    "unet": "--model unet",
    IMAGE_ONCE: "--progressive false",
    USUAL: "--model unet --precision float32 --batch_sizes 256:1 --lr 1e-5 --augment_probability 0 --average 0 "
           "--cache_images false --num_workers 0",
}
STATE = "usual.pth"


def read_image_once(model) -> None:
    """Take the image away from all encoder levels but the finest, as in a classic U-Net, before training.

    The convolutions that read it there are zero and stay so: without a gradient AdamW leaves a weight alone.
    """
    from unet import LAST_STAGE, STAGE_RESOLUTIONS

    for stage, resolution in STAGE_RESOLUTIONS.items():
        if stage < LAST_STAGE:
            weight = model.encoder[str(resolution)].from_image.weight
            weight.data.zero_()
            weight.requires_grad_(False)


def train_as_usual(trainer, loaders: tuple, epochs: int) -> list[dict[str, float]]:
    """Train the classic U-Net as people run it, and write final_model.pth into the folder of the trainer.

    float32, one image a step, RMSprop at 1e-5 with momentum 0.999, gradients clipped to 1, the rate divided by ten
    after 5 epochs without a better validation Dice: the settings of milesial/Pytorch-UNet, the most used script. Images
    are decoded at every step and not augmented. After a kill it goes on from the last finished epoch.

    Args:
        trainer: a ProgressiveTrainer with a UNet; its optimizer is not used.
        loaders: train and validation loader, of batches of one image.
    Returns:
        One row an epoch: stage, epoch, dice, seconds and processor_seconds of training.
    """
    import torch

    from checkpoints import save_checkpoint
    from system.atomic import atomic_write
    from training.loss import bce_dice_loss
    from training.snapshots import snapshot

    model = trainer.model.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    state, rows = trainer.folder.file(STATE), []
    kept = {"model": model, "optimizer": optimizer, "plateau": plateau}
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        rows = saved["rows"]
        for name, part in kept.items():
            part.load_state_dict(saved[name])
    for epoch in range(len(rows), epochs):
        begin, busy = time.perf_counter(), time.process_time()
        model.train()
        loaders[0].set_epoch(epoch)
        for batch in loaders[0]:
            loss = bce_dice_loss(model(batch["image"].to(trainer.device)), batch["mask"].to(trainer.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        row = {"stage": model.stage, "epoch": epoch + 1, "seconds": time.perf_counter() - begin,
               "processor_seconds": time.process_time() - busy}
        rows.append(row | {"dice": trainer.validate_epoch(loaders[1], epoch)["dice"]})
        plateau.step(rows[-1]["dice"])
        with atomic_write(state) as file:
            torch.save({"rows": rows} | {name: part.state_dict() for name, part in kept.items()}, file)
    trainer.recipe = loaders[0].recipe
    save_checkpoint(trainer.folder.file("final_model.pth"), snapshot(trainer, None))
    return rows
