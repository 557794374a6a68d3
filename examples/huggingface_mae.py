"""Hugging Face Trainer: a masked autoencoder (ViTMAE), regularized by a mixin and watched.

    pip install 'dse-ext[ssl,transformers]'
    python examples/huggingface_mae.py

The model is randomly initialized; ViTMAEForPreTraining.from_pretrained(...) trains on from a
checkpoint in the same way.
"""

import argparse

import torch
from torchvision.transforms import Compose, Normalize, ToTensor
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

from dse_ext.data import TextureScenes
from dse_ext.integrations.transformers import DSEMonitorCallback, DSETrainerMixin

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="runs/huggingface_mae")
args = parser.parse_args()


class DSETrainer(DSETrainerMixin, Trainer):
    pass


torch.manual_seed(0)
model = ViTMAEForPreTraining(
    ViTMAEConfig(
        image_size=64,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=192,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
    )
)

transform = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
train = TextureScenes(args.steps * 16, size=64, transform=transform)
heldout = TextureScenes(32, size=64, split="heldout", transform=transform)


def collate(samples):
    return {"pixel_values": torch.stack([image for image, _ in samples])}


trainer = DSETrainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=train,
    data_collator=collate,
    # The encoder's last hidden state: the visible patch tokens, without the class token.
    dse_regularizer=0.001,
    dse_module="vit",
    callbacks=[
        # In evaluation, too, the encoder masks: always the same patches, as the monitor seeds it.
        # A random network can have a high DSE: the first steps are no peak to fall from.
        DSEMonitorCallback(collate(list(heldout))["pixel_values"], module="vit", every=5, start=10)
    ],
)
trainer.train()

for row in trainer.state.log_history:
    if "dse_monitor/score" in row:
        print(f"step {row['step']:>3}  DSE of the probe images {row['dse_monitor/score']:.4f}")
