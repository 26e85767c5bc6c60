"""What each sublayer costs on a device, as data: tables, cost terms, and the choice in a budget.

Imports `profiles`, `plans` and `utils`; `measurement` fills the tables.
"""
