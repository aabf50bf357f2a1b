"""Studies of networks that were trained from different seeds; `run` measures one for every seed.

    python -m mergejax.main --config=configs/proj/alignment/barrier.py --workdir=runs/barrier

Every seed has a folder in the workdir with its networks and what was measured; a second run makes
what is missing. `docs/alignment.md` has the tables.
"""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from mergejax import data, workdir
from mergejax.alignment_studies import barrier, dimat, moe, vit, widths
from mergejax.checkpoints import fingerprint
from mergejax.errors import MergeError, did_you_mean

Record = dict[str, Any]
RECORDS, TABLE = "records.json", "results.md"
STUDIES: Mapping[str, Any] = {
    "barrier": barrier,
    "dimat": dimat,
    "moe": moe,
    "vit": vit,
    "widths": widths,
}


def run(
    config: ml_collections.ConfigDict, folder: pathlib.Path, book: workdir.Logbook
) -> list[Record]:
    """Measures what of a study the workdir does not hold yet; writes its table and its picture.

    Args:
        config: see `configs/proj/alignment/barrier.py`; `alignment` says which study and seeds.
        folder: the workdir; may be empty or absent.
        book: told what is going on.

    Returns:
        The records of all seeds.

    Raises:
        MergeError: an unknown study, data sets that are missing, a workdir of other settings.
    """
    name = config.alignment.study
    if name not in STUDIES:
        hint = did_you_mean(name, STUDIES)
        raise MergeError(f"config.alignment.study: there is no study '{name}', {hint}")
    study, records = STUDIES[name], []
    tasks = data.load(config, folder, book)
    for seed in config.alignment.seeds:
        one = config.copy_and_resolve_references().unlock()
        one.seed = seed
        own = folder / f"seed_{seed}"
        fingerprint.claim(one, own, tasks)
        asked = json.loads(one.alignment.to_json())
        known = fingerprint.read_json(own / RECORDS)
        if known.get("alignment") != {**asked, "seeds": seed}:
            found = study.measure(one, tasks, own, book)
            known = {"alignment": {**asked, "seeds": seed}, "records": found}
            fingerprint.write_json(own / RECORDS, known)
        records += [{"seed": seed, **record} for record in known["records"]]
        _write(study, records, folder)
    return records


def _write(study: Any, records: Sequence[Record], folder: pathlib.Path) -> None:
    content = io.BytesIO()
    study.picture(records).savefig(content, format="png")
    workdir.write_bytes(folder / "picture.png", content.getvalue())
    workdir.write_text(folder / TABLE, f"{study.table(records)}\n\n![picture](picture.png)\n")
