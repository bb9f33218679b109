"""Azure Blob Storage for torchferry: ``az://``, ``abfs://`` and ``abfss://``, configured by an adlfs filesystem."""

from torchferry_azure.backend import AzureBackend

__all__ = ["AzureBackend"]
