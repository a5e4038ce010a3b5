"""Training for question answering: its settings."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training run, named as the flags of the training script. The record of a
    run contains them in this order."""

    model: str  # a folder, a Hub name or a config file
    data_path: str
    output: str
    overwrite: bool
    tokenizer: str | None  # None: the model's
    seed: int
    negatives: str  # a kind of negatives, or "none"
    negative_ratio: float
    prompt_order: str
    max_length: int | None  # tokens of an example; None: no limit
    num_epochs: float
    max_steps: int | None  # None: all of num_epochs
    learning_rate: float
    batch_size: int  # questions in a batch of one process
    gradient_accumulation_steps: int
    optim: str
    fully_shard: bool
    trainer: list[str]  # "KEY=VALUE", fields of TrainingArguments
    eval_data: str | None
    patience: int

    @property
    def negative_kind(self) -> str | None:
        return None if self.negatives == "none" else self.negatives

    def inputs(self) -> list[str | None]:
        """The files and folders that the run reads, or names on the Hub."""
        given = [override.partition("resume_from_checkpoint=")[2] for override in self.trainer]
        return [self.model, self.tokenizer, self.data_path, self.eval_data, *given]
