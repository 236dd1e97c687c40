"""Our editors against the authors' own code, on recorded cases.

``python -m tests.golden DIR [--editor E] [--model M]`` runs every case in DIR of an editor that this project has and
prints how far it is from what the authors' code gave. DIR has the form of ``../shared/golden`` (its README says what
each number is and where each tolerance comes from); a small extract lies in ``tests/golden/data``.
"""
