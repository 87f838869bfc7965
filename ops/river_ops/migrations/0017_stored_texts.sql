-- Text completions are stored beside chats, and a tenant may have nothing kept at all.

alter table stored_completion rename column messages to asked;   -- the messages of a chat, the prompt of a text

alter table stored_completion
  add column kind text not null default 'chat' check (kind in ('chat', 'text'));

alter table tenant drop constraint tenant_completions_kept_s_check;
alter table tenant
  add constraint tenant_completions_kept_s_check check (completions_kept_s >= 0);   -- 0: nothing is kept
