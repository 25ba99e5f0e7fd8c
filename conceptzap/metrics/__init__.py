"""Metrics turn a comparison of base and erased model into numbers. A member is a file here.

The contract of a member:

`score(comparison) -> Iterator[Score]`: every number it has to say, with its 95 % interval.
    `comparison` (`evaluation.comparison.Comparison`) has one `Sample` a probe: what all classifiers see in
    the base's picture (`before`) and in the erased model's of the same seed (`after`), and the
    classifiers' features of both, [samples, d] row by row; d is 0 where none has any, `identical`
    is empty where nothing was drawn one by one, `gates` where some edit has no gate, `apart` 0
    where no second seed was drawn. Nothing may be drawn, and no sample changed.

Each `Score` names its metric, the slice it is about ("" for all, `erase/...`, `keep/...`,
`concept/NAME`, `label/NAME`), n (pictures it rests on) and which way is better. Shares are 0 to 1.
Intervals come from `evaluation.intervals`: resampled by prompt, by concept first where there are
several, and never narrower than n pictures without an exception allow.

Yield nothing where a metric does not apply (no such pictures, too few of them, no features); 0 is a
measurement, and an exception is a bug. The docstring says the equation and its source.
"""
