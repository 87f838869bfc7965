-- Why what a run had learned is gone, if it is; such a run refuses every operation.

alter table run add column lost text;
