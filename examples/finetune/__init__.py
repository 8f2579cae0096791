"""The main job on a real model: fine-tune, be killed in the middle of a save, resume elsewhere, open the result.

``python -m examples.finetune`` (or ``make demo``). The modules:

* ``__main__``: the command line;
* ``orchestrator``: the story, one part after the other;
* ``launch``: one ``torchrun`` with its workers: start, follow, freeze, kill, clean up;
* ``worker``: what each process of a run does; the only place that trains and saves;
* ``base_model``, ``texts``: what is trained, and on what;
* ``raw_write``: the yardstick;
* ``inspection``: what is looked at after each run, and the final opening with plain transformers;
* ``last_look``: what the command line says of the checkpoints in the end, and a page about the last;
* ``events``, ``task``: what orchestrator and workers tell each other;
* ``report``: the table at the end; ``console``: output.
"""
