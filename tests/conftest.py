"""What every test shares."""

import os

import pytest


@pytest.fixture(autouse=True)
def environment_of_children():
    """recon.main sets MKL_CBWR for its process; here the processes of later tests would inherit it."""
    before = os.environ.get("MKL_CBWR")
    yield
    if before is None:
        os.environ.pop("MKL_CBWR", None)
    else:
        os.environ["MKL_CBWR"] = before
