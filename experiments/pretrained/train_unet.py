"""Train a diffusers UNet2DModel on Fashion-MNIST as diffusers' own examples do, and save it.

    python experiments/pretrained/train_unet.py DATA FOLDER --minutes 60

Nothing of bayesdiff is used: this stands for a network that somebody else has trained. DATA holds
``FashionMNIST/raw``; FOLDER becomes a pipeline folder. A tenth of the labels is hidden behind an
eleventh, "no class".
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torchvision.datasets import FashionMNIST

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("folder", type=Path)
parser.add_argument("--minutes", type=float, default=60, help="of processor time")
parser.add_argument("--batch", type=int, default=64)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
data = FashionMNIST(options.data)
images, labels = data.data[:, None].float() / 127.5 - 1, data.targets
unet = UNet2DModel(
    sample_size=28,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(16, 32, 64),
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    num_class_embeds=11,
)
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
begin, step, loss_sum = time.process_time(), 0, 0.0
while (share := (time.process_time() - begin) / (60 * options.minutes)) < 1:
    optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 200, 4 * (1 - share))
    chosen = torch.randint(len(images), (options.batch,))
    x, y = images[chosen], labels[chosen]
    y = torch.where(torch.rand(len(y)) < 0.1, 10, y)
    noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
    noisy = scheduler.add_noise(x, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        said = unet(noisy, t, class_labels=y).sample
    loss = F.mse_loss(said.float(), noise)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    average.step(unet.parameters())
    step, loss_sum = step + 1, loss_sum + loss.item()
    if step % 100 == 0:
        print(f"step {step}, {share:.0%} of the time, loss {loss_sum / 100:.4f}", flush=True)
        loss_sum = 0.0
average.copy_to(unet.parameters())
DDPMPipeline(unet, scheduler).save_pretrained(options.folder)
record = {"steps": step, "images_seen": step * options.batch, "cpu_minutes": options.minutes}
(options.folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
