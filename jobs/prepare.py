"""Documents into a corpus folder, on a Ray cluster.

    ray job submit --working-dir . -- python -m jobs.prepare damic-text source.name=files \
        source.files=[/nfs/news/*.parquet] source.text=body cluster.workers=8 --out /nfs/corpora/news

Options and recipes are those of `distclust prepare`. --out must be given, as an absolute path on storage that
every node sees; so must the documents be, or under a URL that every node reaches. Submitted again, it does
what is missing.
"""

from __future__ import annotations

import sys

from jobs import submit

if __name__ == "__main__":
    sys.exit(submit("prepare", sys.argv[1:], needed=("--out",), paths=("--out",)))
