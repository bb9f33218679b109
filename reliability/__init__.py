"""What becomes of saves, loads and copies when they are cut short or killed, on each cloud's stand-in on this machine.

``python -m reliability`` prints one table; it uses torchferry's public functions only.
"""

import os

# Before any cloud library is imported: nobody's settings, and never a real cloud.
for _name in list(os.environ):
    if _name.startswith(("AWS_", "AZURE_", "FSSPEC_", "GOOGLE_")):
        del os.environ[_name]
os.environ.update(
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)
