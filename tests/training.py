"""A tiny model that learns repeated tokens with the Hugging Face Trainer, on the CPU."""

import torch

from .tiny import D_VOCAB, llama

N_TOKENS = 32


class Repeats(torch.utils.data.Dataset):
    """Random tokens followed by the same tokens again; always the same ones."""

    def __init__(self, n=4096, seed=0, d_vocab=D_VOCAB):
        draw = torch.Generator().manual_seed(seed)
        first = torch.randint(4, d_vocab, (n, N_TOKENS // 2), generator=draw)
        self.rows = torch.cat([first, first], dim=1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(folder, callbacks=(), model=None, steps=12, **options):
    """A Trainer that is ready to train."""
    from transformers import Trainer, TrainingArguments

    made = TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": [],
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "logging_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 0,
            **options,
        },
    )
    model = llama(layers=2, sharpness=1.0).train() if model is None else model
    rows = Repeats()
    return Trainer(
        model=model,
        args=made,
        train_dataset=rows,
        eval_dataset=torch.utils.data.Subset(rows, range(8)),
        callbacks=list(callbacks),
    )
