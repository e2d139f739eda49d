"""finetune-trainer local: train, merge and convert on one machine; what `make train` calls.

The stages are those of the cluster, with the folder `models/.finetune` as their object store, and
the results laid out where people look for them:

    models/lora_adapter/    adapter and tokenizer      (local train)
    models/merged/          16-bit safetensors         (local merge)
    models/gguf/            GGUF files                 (local gguf)
"""
