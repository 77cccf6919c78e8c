"""From a table to what the networks see and back; one module per column kind, everything declared by the schema."""

from common.encoding.table import EncodedTable, TableEncoding, encode_column

__all__ = ["EncodedTable", "TableEncoding", "encode_column"]
