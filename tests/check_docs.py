"""Process every notebook as a docs build does (imports, exported cells, show_doc), without Quarto."""

from pathlib import Path

from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

if __name__ == "__main__":  # proc_nbs spawns workers, which import this file
    refresh_quarto_yml()
    cache = proc_nbs(force=True)
    nbs = cache.parent / "nbs"
    wanted = {p.relative_to(nbs) for p in nbs.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(nbs).parts)}
    missing = sorted(str(p) for p in wanted if not (Path(cache) / p).exists())
    if missing or not wanted:
        raise SystemExit(f"no documentation was made of {missing or 'anything'} (is a parent folder's name starting with a dot?)")
    print(f"{len(wanted)} notebooks ready for Quarto in {cache.name}/")
