"""Packages of sep-mldc. All other metadata is in pyproject.toml."""

from setuptools import setup


setup(
    packages=[
        "modeling_sep_mldc",
        "trainer",
        "trainer.audit",
        "trainer.data",
        "trainer.hub",
        "trainer.lexical",
        "trainer.losses",
        "trainer.metrics",
        "trainer.thresholds",
        "augmentation",
    ],
    package_data={
        "modeling_sep_mldc": ["py.typed"],
        "trainer": ["py.typed"],
        "trainer.hub": ["model_card_template.md"],
        "augmentation": ["py.typed", "templates/*", "prices.json"],
    },
)
