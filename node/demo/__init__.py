"""``countersign demo``: a whole consortium, one governed fine-tune, and proofs, on one machine in minutes.

``story.py`` tells it act by act; ``consortium.py`` is the parties and what they sign, ``processes.py`` their
operating-system processes, ``claiming.py`` and ``display.py`` what a person sees, ``keeping.py`` what goes to a
custodian, ``findings.py`` what the rights-holder's node says afterwards, ``report.py`` the page that stays.

Nothing here is on the trust path: every rule is checked by the nodes, every proof by ``countersign verify``.
The training job and its text belong to ``trainer_client`` and run as processes of their own.
"""
