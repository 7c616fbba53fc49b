import sqloss._C
