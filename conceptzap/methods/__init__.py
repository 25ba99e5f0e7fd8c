"""Methods, one file each: concepts -> edits. The file name is the method's name.

The contract, which `tests/test_methods.py` holds every file to:

    \"\"\"One line that says what it is, then the paper's equation.\"\"\"
    PAPER = "2303.07345"             the arXiv number, "" where there is none; `presets/papers.bib` has it
    EDITS = "tokens + weight, gated"   the ops of what erases, then "; key: ..." of what restores, if
                                     anything; "gated" where an edit stands behind a gate

    @dataclass(frozen=True)
    class Config:                    settings: int, float, str or bool, each with a default;
        steps: int = 100             the comment beside one explains it in `conceptzap methods NAME`

    def erase(base, task, cfg, report) -> Iterator[Edit]

`base`    a frozen `Base` with no edits attached; it must be left as it was
`task`    a `Task`: concepts and anchors in pairs ("" is the empty prompt), `keep` words that the
          base knows, none of them a concept
`cfg`     a `Config`; counts in it are at least 1 (`planning.COUNTS`), other numbers not negative
`report`  a `Report`. `report.seed` is where all randomness comes from: the same arguments give the
          same edits, bit for bit on a CPU. Slow work goes through `report.count` and
          `report.progress`; `report.session(about)` is where a training is kept, None where nothing is.
          `report.watch(edits)`, just before a training, lets samples of it be drawn

`erase` yields at least one `Edit` of the role "erase", and edits of the role "key" where the method
has a key that restores the concept. Every edit must change something for the concept's own prompts.
Tensors may be trained parameters on any device; they are stored as fp16. Raises `UsageError` for a
setting that means nothing, `ResourceError` for memory and for a training that diverges. A method
with optimisation has a setting `steps`, one that trains on batches `batch`.

A closed form may also have `unsolved(base, task, cfg, report) -> Iterator[solving.Unsolved]`, of which
`solving.solved` makes what `erase` yields: a list of concepts solves those of many at once. What reads texts
comes before it is yielded; what is yielded holds sums, not states, for as many as are solved together.
"""

DEFAULT = "zap"
HARDENED = "quick"  # what the default is hardened with on the built-in checkpoint, where that takes seconds
