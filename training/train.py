"""Fit one member: an SMP network with a mask head and a presence head.

It reads the competition's own train.csv (either layout) and train_images, or what synthetic.py
writes in their likeness. A fit has three parts:

1. Crops. Windows of the strips, most of them around a defect of a class that is drawn, teach the
   mask head, and cell by cell the features that the presence head pools.
2. Whole strips. The batch-norm statistics are taken anew from whole strips and frozen; then whole
   strips, half of them clean, teach the presence head what it will be asked on Kaggle. Pooled over
   crops alone it learns another question: a gate of that kind took a prototype's Dice from 0.83
   to 0.03.
3. The heads alone, on strips that the network has not seen: the presence head is fitted once more,
   on hundreds of them, and the mask head's biases are set so that the kernel's threshold cuts each
   class where its Dice is best.

RUNS/NAME keeps the states and the losses of parts 1 and 2. The same command goes on from the last
state, and ends with the same weights as if it had not been stopped, on a CPU bit for bit.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from kernel.command import new_parser, run_command
from kernel.files import json_text
from kernel.logs import log
from kernel.members import hash_file
from training.config import Config
from training.fit import Fit, find_crops, fit_network, fit_within_memory
from training.heads import refit_heads
from training.inputs import Inputs, read_inputs
from training.module import MemberModule
from training.options import add_options
from training.pace import choose_steps
from training.results import (
    SCORES,
    add_experiment,
    read_weights,
    score_held_out,
    warn_of_shifts,
    write_checkpoint,
    write_scores,
)
from training.states import crops_of, describe_experiment

EXAMPLE = (
    "  python training/train.py --data data/steel --name resnet34 --encoder resnet34 --arch Unet "
    "--fold 1"
)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    # A list's lines are searched for options, by their whole names:
    parser = new_parser(__doc__, EXAMPLE, allow_abbrev=False)
    add_options(parser)
    return parser.parse_args(arguments)


def choose_crops_and_steps(
    args: argparse.Namespace, config: Config, inputs: Inputs
) -> tuple[Config, int]:
    """Return the experiment with the steps that its minutes hold, and the crops a step."""
    machine = inputs.machine
    crops = config.crops or crops_of(machine.folder(config)) or find_crops(config, machine.device)
    if not args.minutes:
        return config, crops
    n_strips = 2 * len(inputs.pairs) + len(inputs.scored.names)
    n_strips += len(inputs.unlabelled[0].names) if args.taught_gates else 0
    fitted = replace(config, crops=crops)
    chosen = choose_steps(fitted, inputs.sources, machine, args.minutes, n_strips)
    return replace(chosen, crops=config.crops), crops


def train(args: argparse.Namespace) -> int:
    """Fit, write the checkpoint, validate, and add a row to experiments.csv."""
    config, inputs = read_inputs(args)
    config, crops = choose_crops_and_steps(args, config, inputs)
    experiment = describe_experiment(config, inputs.data, inputs.start_from)
    machine = inputs.machine
    network, seconds = fit_within_memory(
        lambda tried: fit_network(
            Fit(tried, inputs.sources, machine, experiment), inputs.statistics, inputs.weights
        ),
        replace(config, crops=crops),
    )
    module = MemberModule(network, config, config.whole_part)
    taught_on = inputs.unlabelled[0] if args.taught_gates else None
    refit_heads(module, inputs.pairs, args.present_weight, taught_on)
    checkpoint = args.out / f"{config.name}.safetensors"
    before = read_weights(checkpoint)
    write_checkpoint(network, config, checkpoint)
    log.info("%s: written", checkpoint)
    scores = score_held_out(network, config, inputs.scored, machine.device)
    add_experiment(args.out / "experiments.csv", config, scores, seconds, args.comment)
    fit = {"folds": config.folds, "data": inputs.hashes[0], "sha256": hash_file(checkpoint)}
    write_scores(machine.folder(config) / SCORES, config, scores, fit)
    print(json_text(scores.summary()), end="")
    warn_of_shifts(checkpoint, before)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: train(parse_args(arguments)))


if __name__ == "__main__":
    main()
