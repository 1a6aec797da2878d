"""The scheduler's process: admission, the ledger of pool ids, the block manager, reports and totals."""
