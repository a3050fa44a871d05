"""Make a recipe's tokenizer and token shards ahead of a run, which would otherwise make them when it starts.

python launch/prepare.py recipes/quickstart.yaml [key.sub=value ...]
"""

from argparse import Namespace

from dash_train.command import recipe_parser, run_command
from dash_train.data.loader import RowDataset
from dash_train.data.prepare import prepare
from dash_train.recipe import load_recipe


def main(args: Namespace) -> None:
    recipe = load_recipe(args.recipe, args.overrides)
    folder = prepare(recipe.data)
    weights = [source.weight for source in recipe.data.sources]
    for split, passes in (("train", weights), ("validation", [1.0] * len(weights))):
        rows = RowDataset(
            folder,
            split,
            seq=recipe.train.seq,
            chunk_size=recipe.model.attention.chunk_size,
            weights=passes,
            seed=recipe.data.seed,
        )
        meta = rows.shards.meta
        print(
            f"{split}: {meta.documents:,} documents, {meta.tokens:,} tokens, {meta.text_bytes / meta.tokens:.2f} bytes "
            f"per token, {rows.rows(0):,} rows of {rows.seq:,} tokens, {rows.fill():.1%} full"
        )
        if len(weights) > 1:
            for source in rows.summary():
                print(f"  {source}")
    print(folder)


if __name__ == "__main__":
    run_command(main, recipe_parser(__doc__))
