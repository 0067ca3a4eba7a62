"""The command line: ``project {fit,validate,test,predict,export,benchmark,tune,…} --config …``, on LightningCLI.

:mod:`project.frame.verbs` says how to add a verb.
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from project.data import ImageDataModule
from project.frame import trust
from project.frame.net_arguments import give_
from project.frame.parser import Parser
from project.frame.paths import Run, as_argument, write_whole
from project.frame.rooms import optional
from project.frame.verbs import VERBS, Trainer, with_verb
from project.learning.checkpoints import check_checkpoint
from project.learning.classifier import Classifier

log = logging.getLogger(__name__)

_FROM_DATA_TO_CLASSIFIER = ("num_classes", "image_shape", "class_names", "mean", "std")
_FURTHER = (
    "On a model file alone: project {predict,test,unpack} --model FILE. A function of a file in the working directory: "
    "project FILE.FUNCTION."
)
_TRUST = "Packages whose classes a run or checkpoint of somebody else may name, with commas between them."
_DOTTED = re.compile(r"[^\W\d]\w*(\.\w+)+")


class CLI(LightningCLI):
    """Builds classifier, data module and trainer from YAML and options, and runs a verb.

    Example::

        >>> from project.frame import CLI
        >>> net = "--model.net=project.models.SmallInception"
        >>> options = ["--data=project.data.Digits", net, "--trainer.max_epochs=5"]
        >>> cli = CLI(options, run=False)
        >>> cli.datamodule.num_classes, cli.trainer.max_epochs, type(cli.model.net).__name__
        (10, 5, 'SmallInception')

    Args:
        args: words of the command line; ``None`` takes those of this process.
        run: whether the verb runs that ``args`` begin with. If false, ``args`` have no verb, and the attributes
            ``model``, ``datamodule`` and ``trainer`` are ready for your own code.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        args = sys.argv[1:] if args is None else args
        self._verbs, trainer_class = VERBS, Trainer
        for room in ("models.zoo", "data.sets"):  # classes that are loaded can be named without their module
            optional(room)
        self._outside: dict[str, str] = {}
        words = args if run and isinstance(args, list) else []
        if words and _DOTTED.fullmatch(words[0]):
            verb, trainer_class = with_verb(words[0])
            self._verbs, self._outside = {**VERBS, verb: False}, {verb: words[0]}
            args = words = [verb, *words[1:]]
        self._only = next((word for word in words[:1] if word in self.subcommands()), None)
        super().__init__(
            Classifier,
            ImageDataModule,
            subclass_mode_data=True,
            trainer_class=trainer_class,
            parser_class=Parser,
            parser_kwargs={"description": "Train, shrink, measure and deploy image classifiers.", "epilog": _FURTHER},
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verbs, and for each verb the arguments that the command line fills in itself."""
        return {**LightningCLI.subcommands(), **{verb: {"model", "datamodule"} for verb in self._verbs}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The options of a verb take a tenth of a second: leave out those of the verbs that the user did not name."""
        if self._only in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for verb, name in self._outside.items():  # a dotted name cannot be a key
            self._subcommand_parsers[verb].prog = f"{parser.prog} [options] {name}"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        parser.add_net_arguments("model.net")
        parser.name_items_of("trainer.callbacks")
        parser.add_argument("--trust", type=str | None, help=_TRUST)
        for key in _FROM_DATA_TO_CLASSIFIER:
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if isinstance(args, list):
            words = getattr(Trainer, "_words", list)  # of the benchmark, which takes lists
            self.config = parser.parse_args(words(_with_config_of_run(args, self.subcommands())))
        else:
            self.config = parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """Check that ``ckpt_path`` is a checkpoint. Unlike Lightning, take no values of the configuration from it."""
        if "subcommand" not in self.config:
            return
        config = self.config[self.config.subcommand]
        check_checkpoint(config.get("ckpt_path"))
        weights = config.get("ckpt_path") or config.get("run")
        if self.config.subcommand != "fit" and self._verbs.get(self.config.subcommand, True) and not weights:
            raise ValueError(
                f"{self.config.subcommand} needs trained weights: give --run DIR (a run's folder below logs/) "
                "or --ckpt_path FILE."
            )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.trainer.experiment is None and config.get("config"):
            files = config.config if self.subcommand == "tune" else config.config[:1]
            config.trainer.experiment = "_".join(Path(str(file)).stem for file in files)

    def instantiate_classes(self) -> None:
        """Build the parts of a verb. To predict on image files only the checkpoint is needed, not the data set."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand != "predict" or config.images is None:
            self._instantiate_data_first(config)
            return
        path = config.ckpt_path or Run.find(config.run).weights()
        check_checkpoint(path)
        self.config_init = self.config
        self.datamodule = None
        self.model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        kernels, accelerator = config.trainer.kernels, "cpu" if config.trainer.accelerator == "cpu" else "auto"
        self.trainer = Trainer(
            logger=False, observe=False, enable_progress_bar=False, kernels=kernels, accelerator=accelerator, devices=1
        )

    def _instantiate_data_first(self, config: Namespace) -> None:
        """Build the data first, which give arguments of the net. Record the configuration before the net is built."""
        data = self._instantiate_only(Namespace(data=config.data)).data
        for name in _FROM_DATA_TO_CLASSIFIER[1:]:
            if not hasattr(data, name):
                raise ValueError(f"{type(data).__name__} has no {name}: set it in the class or in its __init__.")
        described = config.model.net, config.data
        if isinstance(config.model.net, Namespace):
            give_(config.model.net, config.net_arguments, data)
        vars(self).pop("config_dump", None)  # Lightning's copy lacks the arguments that the data give
        self._dump_config()
        try:
            config.data = data
            config.model.net = self._net(config)
            super().instantiate_classes()
        finally:
            config.model.net, config.data = described

    def _net(self, config: Namespace) -> nn.Module:
        path = getattr(config.model.net, "class_path", "")
        try:
            return self._instantiate_only(Namespace(data=config.data, model=Namespace(net=config.model.net))).model.net
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"model.net is {path}, and it cannot be built with the arguments given ({error}): correct "
                "model.net.init_args or net_arguments; PROJECT_DEBUG=1 shows where."
            ) from error

    def _instantiate_only(self, part: Namespace) -> Namespace:
        """Build one part of the configuration of the verb."""
        return self._parser(self.subcommand).instantiate_classes(part, instantiate_groups=False)

    def _run_subcommand(self, subcommand: str) -> None:
        assert isinstance(self.trainer, Trainer)
        with self.trainer.own_kernels():
            super()._run_subcommand(subcommand)

    def before_tune(self) -> None:
        assert isinstance(self.trainer, Trainer) and self.subcommand
        config = self.config[self.subcommand]
        self.trainer.configuration = yaml.safe_load(whole_config(self._parser(self.subcommand), config))

    before_find_batch_size = before_tune

    def after_fit(self) -> None:
        """Log the result, the folder of the run, and the next commands."""
        trainer = self.trainer
        assert isinstance(trainer, Trainer)
        if not trainer.is_global_zero or trainer.run is None:
            return
        accuracy = trainer.callback_metrics.get("test/accuracy")
        folder = as_argument(trainer.run.folder)
        log.info("")
        if accuracy is not None:
            log.info("test accuracy  %.2f %%", 100 * float(accuracy))
        log.info("run            %s", folder)
        if trainer.run.result.is_file():
            result = json.loads(trainer.run.result.read_text(encoding="utf-8"))
            log.info("result         %s, the fastest accurate file here, in %s", result["file"], result["engine"])
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            log.info("look           tensorboard --logdir %s", as_argument(trainer.run.folder.parent))
        if not trainer.run.best_or_last.is_file():
            return  # trainer.enable_checkpointing is false: no verb could load the net
        log.info("test           project test --run %s", folder)
        log.info("predict        project predict --run %s --images PATH", folder)
        log.info("export         project export --run %s --format onnx-int8", folder)


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration with all defaults to the run's ``config.yaml`` when a fit begins.

    The file of a resumed run changes after the first step, so that options with which the resume fails are not kept.
    """

    _waiting: Run | None = None

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._waiting = getattr(trainer, "run", None) if stage == "fit" else None
        if self._waiting is not None and not self._waiting.config.is_file():
            self.on_train_batch_end()

    def on_train_batch_end(self, *args: Any) -> None:
        if self._waiting is not None:
            text = whole_config(self.parser, self.config)
            write_whole(self._waiting.config, lambda part: part.write_text(text, encoding="utf-8"))
            trust.remember(self._waiting.config)
            self._waiting = None


def whole_config(parser: LightningArgumentParser, config: Namespace) -> str:
    """The configuration of a run as YAML, with all defaults and without the arguments of the verb."""
    config = config.clone()
    for key in [key for key in config.__dict__ if key not in trust.OF_A_RUN]:
        del config[key]
    return parser.dump(config, skip_none=False, skip_validation=True)


def _with_config_of_run(args: list[str], verbs: dict[str, set[str]]) -> list[str]:
    """``verb --run DIR …`` -> ``verb --config DIR/config.yaml --run DIR …``. Options after it override its values.

    The configuration of a checkpoint below a run's folder is found in the same way, if there is no other.
    """
    words = [arg.partition("=") for arg in args]
    given = [(option, value or next(iter(args[index + 1 :]), "")) for index, (option, _, value) in enumerate(words)]
    trust.trusted[:] = ",".join(value for option, value in given if option == "--trust").split(",")
    place = next((index for index, word in enumerate(args) if word in verbs), 0)
    options = dict(given[place + 1 :])
    alone = args[place : place + 1] != ["fit"] and not any(word.startswith(("--config", "-c")) for word in args)
    if named := options.get("--run") or options.get("--resume"):
        run = Run.find(named)
    elif (path := options.get("--ckpt_path")) is not None and alone:
        check_checkpoint(path)
        if not (run := Run(Path(path).resolve().parent.parent)).config.is_file():
            raise ValueError(f"ckpt_path is {path!r}, and no config.yaml belongs to it: give --config or --run.")
    else:
        return args
    return [*args[: place + 1], "--config", trust.configuration(run), *args[place + 1 :]]
