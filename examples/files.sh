#!/bin/sh
# Rank a file of requests on the command line, and check the scores, with the model inside packscore.
#
#     sh examples/files.sh
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
model=$(python -c "import packscore; print(packscore.shipped_model_path())")

cat > "$folder/in.csv" <<'END'
query,document
delete a directory tree,Rename a file or directory.
delete a directory tree,Recursively delete a directory tree.
shuffle a list,"Shuffle list x in place, and return None."
shuffle a list,Open a file in binary or text mode.
END

packscore rank "$folder/in.csv" -o "$folder/out.csv" -m "$model" --device cpu --return-documents --quiet
cat "$folder/out.csv"
packscore verify "$folder/in.csv" -m "$model" --device cpu
