"""Attacks try to bring an erased concept back. A member is a file here; its name is `--attack`'s.

The contract of a member:

    \"\"\"First line: what it does.\"\"\"
    PAPER = "2402.09063"          # arXiv id, "" where there is none
    PAPER_SETTINGS = {...}        # what `--budget paper` sets; {} where quick is all there is
    FORMS = (TRANSFER, ...)       # of its search, if it has any; `victim.forms(FORMS)` says which to try

    @dataclass(frozen=True)
    class Config: ...             # plain typed fields, the defaults are `--budget quick`

    def attack(victim, cfg, report) -> Iterator[Attempt]

`victim`  a `redteam.victim.Victim`: the base, the edits that are attacked, the concept, n probes that
          ask for it, how they are drawn. The base's own pictures of the probes are the attacker's
          to look at, a judge is not.
`cfg`     a `Config`
`report`  slow work goes through `report.count`. All randomness comes from `victim.generator`: the
          same arguments give the same attempts, bit for bit on a CPU.

Each `Attempt` is one try at all n probes; those that came through are not drawn again. What takes
long goes through `victim.once`, `in_parts` or `search.search`, which keep it: the same attack, given
again, goes on where it was stopped. A search by gradients is made in each of its `FORMS`, as far as
they mean something: `transfer` searches on the base alone; `straight-through` on the base under the
edits, whose gates have a gradient; `evade` adds to the loss how far each gate is from shutting;
`continuous` does the same with embeddings that need be no tokens. The worst of them is the
attack's success rate.

`CONTROL = True` marks what only spends tries: an attack has to do better than these.
"""
