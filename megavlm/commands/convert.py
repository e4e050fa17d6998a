"""`megavlm convert`: checkpoints of other formats and sizes."""

import argparse
from pathlib import Path

from megavlm.commands.options import Commands
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError


def add_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add its options."""
    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between formats, with a certificate",
        allow_abbrev=False,
    )
    convert.set_defaults(command=_convert, takes_sources=True)
    convert.add_argument("sources", nargs="*", help="folders or URLs; several are merged")
    convert.add_argument("--out", help="the new folder")
    convert.add_argument("--to", choices=("native", "mllama", "llama", "megatron"))
    convert.add_argument(
        "--from",
        dest="kind",
        choices=("zero3", "universal", "megatron"),
        help="which to read where a folder holds several",
    )
    convert.add_argument(
        "--decoder-only", action="store_true", help="take the language half of an Mllama alone"
    )
    convert.add_argument("--dtype", choices=("fp32", "bf16"), help="cast the weights")
    convert.add_argument(
        "--weights-only", action="store_true", help="leave the optimiser's moments out"
    )
    convert.add_argument(
        "--ema-decay", type=float, help="merge with weights that fall by this from newest to oldest"
    )
    convert.add_argument(
        "--no-compare", action="store_true", help="do not run both models on the same inputs"
    )
    convert.add_argument("--max-file-gb", type=float, default=5.0)
    words = convert.add_mutually_exclusive_group()
    words.add_argument(
        "--tokenizer", type=Path, help="of an exported model, if not where its checkpoint says"
    )
    words.add_argument(
        "--no-tokenizer", action="store_true", help="export weights alone, without a processor"
    )
    convert.add_argument("--run", dest="run_file", type=Path, help="run file with sizes or layout")
    convert.add_argument("--verify", metavar="FOLDER", help="check a folder by its certificate")


def _convert(plan: Plan | None, options: argparse.Namespace) -> None:
    from megavlm.convert.certificate import summary
    from megavlm.convert.run import Conversion, convert, verify

    if options.verify:
        if options.sources or options.out or plan:
            raise ConfigError(
                f"--verify {options.verify} knows its sources from its certificate; name nothing "
                "else"
            )
        print("\n".join(verify(options.verify)))
        return
    if not options.sources or not options.out:
        raise ConfigError("name the checkpoint to convert, and with --out a new folder")
    conversion = Conversion(
        sources=tuple(options.sources),
        out=options.out,
        to=options.to,
        kind=options.kind,
        decoder_only=options.decoder_only,
        dtype=options.dtype,
        weights_only=options.weights_only,
        ema_decay=options.ema_decay,
        compare=not options.no_compare,
        max_file_gb=options.max_file_gb,
        tokenizer=options.tokenizer,
        with_tokenizer=not options.no_tokenizer,
        plan=plan,
    )
    print("\n".join(summary(convert(conversion), options.out)))
