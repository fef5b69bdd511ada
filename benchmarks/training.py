"""Trains a tiny Llama with SlashCallback, and draws the picture of docs/how-to/training.md.

The task: sequences of 16 random tokens that come twice. Run by `make gallery`; about a minute.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import slashpatch as sp
from slashpatch.reporting.figures import save_figure

STEPS, EVERY, COPY, VOCABULARY, KAPPA = 120, 4, 16, 80, 0.3
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "emergence.png"


class Repeats(torch.utils.data.Dataset):
    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        first = torch.randint(4, VOCABULARY, (4096, COPY), generator=draw)
        self.rows = torch.cat([first, first], dim=1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(callbacks):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, head_dim=16, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to=[], max_steps=STEPS, learning_rate=3e-3,
            per_device_train_batch_size=32, logging_steps=EVERY, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            LlamaForCausalLM(config), arguments, train_dataset=Repeats(), callbacks=callbacks
        )
        trainer.train()


def watcher(measures):
    return sp.SlashCallback(
        EVERY, offsets=range(COPY + 4), measures=measures, random_tokens=True, n_prompts=4,
        max_tokens=64, live=False,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch = watcher(("rank", "cone", "bands", "prefix"))
    train([watch])
    save_figure(watch.result.plot(kappa=KAPPA), PICTURE)
    print(watch.result.table(KAPPA))
