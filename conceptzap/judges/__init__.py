"""Judges look at pictures and say what they see. A member is a file here; its name is `--judge`'s.

The contract of a member:

`load(base, option, world) -> Iterable[Judge]`: the judges that the name stands for, ready to look.
    `base`: the `Base` that draws; None where the judges are loaded without one.
    `option`: what the user wrote behind the name and a colon (`clip:MODEL`), "" where nothing.
    `world`: the suite's subjects and split, None where there is no suite.
    Raises `UsageError` for an option that cannot be meant and `ResourceError` for what is not
    installed or cannot be read, always before a picture is drawn; nothing is downloaded unasked.

A judge (`evaluation.judging.Judge`) has
`name`: how the result calls it; `digest`: 64 hex digits over its weights or source, so that two
    results are comparable only when the same judge looked;
`kinds`: kind ("object", "style", "nudity" ...) -> the labels it can tell apart;
`predict(pictures) -> Prediction`: `pictures` uint8 [n, h, w, 3], RGB, of any size. The answer
    (`evaluation.comparison.Prediction`) has for each kind n rankings of labels, best first (an empty one:
    nothing of this kind), scores 0 to 1 beside them, `valid` [n] (is it a picture at all; all True
    where the judge cannot say) and `features` float32 [n, d] (d may be 0).

Two functions are optional. A suite whose first judge has them gains what they say:
`fits(base) -> bool`: whether the base draws this judge's world, so that `erase` may end with it;
`world() -> World`: the subjects of a suite that names the judge as its world;
`oracle(suite, concept, base) -> dict`: scores of a model trained without the concept, by the base's
    digest; {} where they are not known.

An installed package adds judges through the entry point group `conceptzap.judges` (a `load`), and
`--judge module:function` takes any function, see `custom`.
"""
