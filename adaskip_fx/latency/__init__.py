"""What each sublayer costs on a device, as data: tables, their terms, and what fits a budget.

Imports `profiles`, `plans` and `utils`; `measurement` fills the tables.
"""
